"""What was built, and which kernels run."""

from sadmoe.ops.compiled import OPS


def build_info() -> str:
    """How the compiled ops were built, which CPU kernels run, and those that this processor can, fastest first."""
    return f"{OPS._build_info()}; cpu kernels: {OPS._cpu_isa()} of {OPS._cpu_isas()}"


def cpu_isas() -> list[str]:
    """The instruction sets of the CPU kernels that this processor runs, fastest first."""
    return OPS._cpu_isas().split(", ")


def use_cpu_isa(isa: str) -> None:
    """Use one instruction set of `cpu_isas()` in the whole process, or "auto": for tests and benches.

    Not while another thread is inside an op.
    """
    OPS._use_cpu_isa(isa)


def cpu_isa() -> str:
    """The instruction set of the CPU kernels in use."""
    return OPS._cpu_isa()


def allow_tf32(allow: bool) -> None:
    """Whether tensor cores may multiply float32 experts on CUDA, operands rounded to 11 bits; at first they may not.

    For the whole process, like torch's own setting, which is not looked at. Not while another thread is inside an op.
    The router is always float32. Raises RuntimeError where sadmoe was built without CUDA kernels.
    """
    if "cuda: yes" not in build_info():
        raise RuntimeError(f"allow_tf32 is for CUDA kernels, and sadmoe was built without ({build_info()})")
    OPS._allow_tf32(allow)
