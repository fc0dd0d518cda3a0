"""What a converted model needs to be loaded and run, beside the dense one."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import sadmoe
import torch
from sadmoe.modules import is_out_of_memory

transformers = pytest.importorskip("transformers")

LOAD = """
import sys, torch, sadmoe
from pathlib import Path
from transformers import AutoModel

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = kilobytes("VmRSS")
model = AutoModel.from_pretrained(sys.argv[1]).eval()
for layer in sadmoe.moe_layers(model).values():
    if sys.argv[2:] == ["packed"]:
        layer.pack_()
with torch.inference_mode():
    for tokens in (1, 200):
        model(input_ids=torch.arange(tokens)[None])
print(kilobytes("VmHWM") - before)
"""


def peak(folder: Path, *packed: str) -> int:
    """Kilobytes that a process takes at most to load a model, to pack it or not, and to run one and 200 tokens."""
    result = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), *packed], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells the memory of a process")
def test_calls_leave_nothing_behind():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    x, w = torch.zeros(1, 8), torch.zeros(1, 8, 8)
    mask, v = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 8)
    experts = torch.ops.sadmoe.sparse_experts.default
    moe = torch.ops.sadmoe.dynamic_k_moe.default
    for calls in (2_000, 60_000):
        before = resident()
        for _ in range(calls):
            experts(x, mask, w, w)
            moe(x, v, v[:, :1], w, w)
    assert resident() - before < 2 << 20  # 48 bytes a call would be 6 MB


TOO_LARGE = """
import resource, torch
from pathlib import Path
from sadmoe import ops

torch.set_num_threads(2)
T, E, s = 200, 4096, 64  # activations of 52 MB in every block of 50 tokens
x, w_up, w_down = torch.randn(T, 16), torch.randn(E, s, 16), torch.randn(E, s, 16)
mask = torch.ones(T, E, dtype=torch.bool)
ops.sparse_experts(x[:2], mask[:2], w_up, w_down)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (30 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    ops.sparse_experts(x, mask, w_up, w_down)
except (MemoryError if torch.__version__ < "2.15" else RuntimeError) as error:  # which torch 2.15 makes of it
    print(error, tuple(ops.sparse_experts(x[:2], mask[:2], w_up, w_down).shape))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux limits the memory of a process")
def test_threads_without_memory_raise_what_one_thread_would():
    result = subprocess.run([sys.executable, "-c", TOO_LARGE], capture_output=True, text=True)
    assert result.stdout == "std::bad_alloc (2, 16)\n", result.stderr


def test_memory_that_lacks_for_a_copy_of_an_argument_is_told_as_such():
    x = torch.zeros(1, 64).expand(1 << 40, 64)  # 256 TiB, were it copied
    with pytest.raises(
        MemoryError if torch.__version__ < "2.15" else RuntimeError, match="bad_alloc"
    ) as raised:
        sadmoe.ops.router_scores(x, torch.zeros(2, 64), torch.zeros(2, 2))
    assert is_out_of_memory(raised.value)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
@pytest.mark.slow
def test_a_converted_model_is_loaded_and_run_in_the_memory_of_the_dense_one(tmp_path):
    """Experts hold the weights once, as they are saved and as the kernels read them, or once otherwise."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = transformers.BertModel(
        transformers.BertConfig(vocab_size=1000, hidden_act="relu", **sizes)
    ).eval()
    model.save_pretrained(tmp_path / "dense")
    quick = sadmoe.RouterConfig(steps=1)
    batches = [{"input_ids": torch.arange(200)[None]}]
    config = sadmoe.ConvertConfig(expert_size=32, router=quick, tau=0.3)
    sadmoe.convert_(model, batches, config, progress=False)
    model.save_pretrained(tmp_path / "converted")
    dense, converted = peak(tmp_path / "dense"), peak(tmp_path / "converted")
    assert dense > 4 * 2 * 512 * 4096 * 4 / 1024, "the weights of the FFNs, at least"
    assert converted <= 1.1 * dense, f"{converted / dense:.2f} times the memory"
    packed = peak(tmp_path / "converted", "packed")
    assert packed <= 1.1 * dense, f"{packed / dense:.2f} times the memory, packed"
