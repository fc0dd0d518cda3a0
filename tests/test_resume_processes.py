"""Long steps in several processes."""

import copy
from contextlib import suppress
from pathlib import Path

import pytest
import sadmoe
import torch
from long_steps import (
    Killed,
    KilledAt,
    assert_close_states,
    batches,
    converted,
    mean_square,
    replace_projections,
)
from processes import run_together
from sadmoe import Checkpoint, FinetuneConfig, SparsifyConfig
from sadmoe.training import processes
from states import same, state
from torch import Tensor, nn

WORKER = """
    import sys
    import test_resume_processes, torch
    from pathlib import Path
    from safetensors.torch import save_file

    rank = int(sys.argv[1])
    torch.set_num_threads(1)
    store = f"file://{sys.argv[2]}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for name, model in test_resume_processes.shared(spoil=rank == 1).items():
        save_file(test_resume_processes.state(model), f"{sys.argv[2]}/{name}.{rank}.safetensors")
    with test_resume_processes.pytest.raises(RuntimeError, match="found a run of [02] updates, and others not"):
        test_resume_processes.killed_and_gone_on(Path(sys.argv[2]) / f"own {rank}")
    with test_resume_processes.pytest.raises(RuntimeError, match="gates of this process are not those of the others"):
        test_resume_processes.trained_by_gates_at(0.1 + 0.2 * rank)
    test_resume_processes.check_layouts(rank)
    model = test_resume_processes.counted()
    save_file(test_resume_processes.state(model), f"{sys.argv[2]}/counted.{rank}.safetensors")
    model = test_resume_processes.killed_and_gone_on(Path(sys.argv[2]) / "kept")
    save_file(test_resume_processes.state(model), f"{sys.argv[2]}/resumed.{rank}.safetensors")
    torch.distributed.destroy_process_group()
"""
SHARED = {"steps": 4, "lr": 1e-3, "accumulate": 2}


def shared(spoil: bool = False) -> dict[str, nn.Module]:
    """What two processes train together, each update from two batches. spoil: start from other weights, as the first
    process's must win."""
    dense, model = converted()
    sparse = copy.deepcopy(dense)
    if spoil:
        for one in (sparse, model):
            next(one.parameters()).data.add_(1.0)
    settings = dict(SHARED)
    sadmoe.sparsify_(sparse, batches(), SparsifyConfig(**settings), progress=False)  # its own teacher
    config = FinetuneConfig(**settings, share=0.01)  # so low that the penalty never rests
    sadmoe.finetune_(model, batches(), config, teacher=dense, progress=False)
    layered = copy.deepcopy(model)
    sadmoe.finetune_layers_(layered, batches(), config, teacher=dense, batch_tokens=8, progress=False)
    dropped, settings["objective"] = copy.deepcopy(dense).train(), "task"  # with dropout

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (
            model(**batch).last_hidden_state[..., :5].square().mean()
        )  # of all it would be that of a norm, a constant

    sadmoe.sparsify_(dropped, batches(), SparsifyConfig(**settings), loss=loss, progress=False)
    return {"sparsify": sparse, "finetune": model, "layers": layered, "dropped": dropped}


LAYOUTS = {  # of 8 rows of 6, and how many entries of these they have
    "turned": (lambda base: base.t(), 48),
    "gapped": (lambda base: base[:, :3], 24),
    "gapped and turned": (lambda base: base[:, :3].t(), 24),
    "one for many": (lambda base: base[0, 5].expand(4096), 1),
    "a row for many": (lambda base: base[1:2].expand(500, 6), 6),
    "channels last": (lambda base: base.reshape(1, 2, 4, 6).permute(0, 3, 1, 2), 48),
    "an entry": (lambda base: base[1, 4], 1),
}


def check_layouts(rank: int) -> None:
    """Collectives of tensors that lie in memory in another order, with gaps, or once for many entries. Raises in a
    process where one is wrong, or what lies beside it has changed."""
    for step, wanted in ((processes.as_first_, 1.0), (processes.sum_, 3.0), (processes.mean_, 1.5)):
        for name, (layout, entries) in LAYOUTS.items():
            own = rank + 1.0
            base = torch.full((8, 6), own)
            step([layout(base)])
            assert layout(base).eq(wanted).all(), f"{step.__name__} of one that is {name}"
            unchanged = 48 if wanted == own else 48 - entries
            assert base.eq(own).sum() == unchanged, f"{step.__name__} beside one that is {name}"


def counted() -> nn.Module:
    """A dense model with a buffer that every training pass adds to, after three updates."""
    model = copy.deepcopy(converted()[0])
    model.register_buffer("seen", torch.zeros(2, dtype=torch.float32))
    model.register_buffer("third", torch.full((), 1 / 3))

    def count(model, args, kwargs):
        if torch.is_grad_enabled():  # a pass of the training
            model.seen += kwargs["input_ids"][0, 1]

    model.register_forward_pre_hook(count, with_kwargs=True)
    config = SparsifyConfig(**{**SHARED, "steps": 3, "objective": "task"})
    sadmoe.sparsify_(model, batches(), config, loss=mean_square, progress=False)
    return model


def trained_by_gates_at(tau: float) -> None:
    dense, model = converted()
    sadmoe.set_tau(model, tau)
    config = FinetuneConfig(steps=2, accumulate=2, tau=None)
    sadmoe.finetune_(model, batches(), config, teacher=dense, progress=False)


def killed_and_gone_on(folder: Path) -> nn.Module:
    """As `shared` sparsifies, but killed after two updates and begun again, and at last only loaded."""
    config, checkpoint = SparsifyConfig(**SHARED), Checkpoint(folder, every=0.0)
    for data in (KilledAt(batches(), 2), batches(), None):
        if data is None:
            torch.optim.AdamW.step = lambda *_: pytest.fail("it was run again")  # in a process of its own
            data = batches()
        model = copy.deepcopy(converted()[0])
        with suppress(Killed):
            sadmoe.sparsify_(model, data, config, checkpoint=checkpoint, progress=False)
        torch.distributed.barrier()  # as processes that begin anew: what the first one wrote is there
    return model


def test_two_processes_do_what_one_does(tmp_path):
    from safetensors.torch import load_file

    assert run_together(WORKER, 2, str(tmp_path)) == [0, 0]
    kept = [load_file(tmp_path / f"{name}.0.safetensors") for name in ("sparsify", "resumed")]
    assert same(*kept)
    assert same(kept[1], load_file(tmp_path / "resumed.1.safetensors"))
    first, second = (load_file(tmp_path / f"counted.{rank}.safetensors") for rank in range(2))
    assert same(first, second)
    assert first["third"] == torch.tensor(1 / 3)  # not rounded by a mean
    alone = state(counted())
    assert alone["seen"].min() > 0
    assert torch.equal(2 * first["seen"], alone["seen"])  # each process ran half of the batches
    for name, model in shared().items():
        first, second = (load_file(tmp_path / f"{name}.{rank}.safetensors") for rank in range(2))
        assert same(first, second)
        start_of = dict(converted()[name not in ("sparsify", "dropped")].state_dict())
        moved = [key for key in first if not torch.equal(first[key], start_of[key])]
        assert len(moved) > 20
        still = [key for key in first if "pooler" in key]  # which no hidden state depends on
        assert still
        assert not set(still) & set(moved)
        assert_close_states(first, state(model))


def test_accumulation_is_one_large_batch():
    dense, _ = converted()
    both = {key: torch.cat([batch[key] for batch in batches(2)]) for key in batches()[0]}
    models = [copy.deepcopy(dense) for _ in range(2)]
    for model, data, accumulate in zip(models, (batches(2), [both]), (2, 1), strict=True):
        config = SparsifyConfig(steps=3, objective="task", lr=1e-3, accumulate=accumulate, alpha=1.0)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.config.attention_probs_dropout_prob = 0.0
        sadmoe.sparsify_(model, data, config, loss=mean_square, progress=False)
    assert_close_states(*(state(model) for model in models))


def test_what_runs_in_one_process_says_so_in_a_group(monkeypatch):
    monkeypatch.setattr("sadmoe.training.processes.place", lambda: (0, 2))
    dense, model = converted()
    with pytest.raises(RuntimeError, match=r"replace_projections_ trains in one process, .* in a group of 2"):
        replace_projections(dense, dense, None)
    with pytest.raises(RuntimeError, match=r"finetune_for_budget_ trains in one process, .* in a group of 2"):
        sadmoe.finetune_for_budget_(model, batches(), budget=0.9, seconds=1.0, dense=dense)


def test_accumulate_must_suit_the_processes(monkeypatch):
    monkeypatch.setattr("sadmoe.training.processes.place", lambda: (0, 2))
    monkeypatch.setattr("sadmoe.training.processes.as_first_", lambda tensors: None)
    dense, _ = converted()
    with pytest.raises(ValueError, match=r"accumulate must be a multiple of the 2 processes .* got 3"):
        sadmoe.sparsify_(dense, batches(), SparsifyConfig(steps=1, accumulate=3), progress=False)
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        SparsifyConfig(steps=1, accumulate=0)
