import numpy as np
from numpy.typing import NDArray

MAX_COST: int

def assign(
    cost: NDArray[np.int32], labels: NDArray[np.int64] | None = None, prices: NDArray[np.int32] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int32]]: ...
