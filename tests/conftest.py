import runpy
import signal
import sys

import pytest
import torch

import diffsim
from diffsim import program
from tests import ROOT

torch.set_num_threads(1)
diffsim.TASKS["cartpole"].max_episode_steps = 24  # of 240: what evaluates a script would take most of the suite's time
diffsim.TASKS["cartpole"].substeps = 1  # of 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _signals():
    """Programs that run in this process set their own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    program.told = False


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a script in this process (importing torch takes seconds): it must exit with 2 and one line, returned."""

    def run(script, *args) -> str:
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        said = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and len(said.splitlines()) == 1, said
        return said

    return run


@pytest.fixture(scope="session")
def reach(tmp_path_factory) -> str:
    """The task of the README, as a user would copy it: "my_task.py:Reach"."""
    code = (ROOT / "README.md").read_text().split("```python\n# my_task.py\n")[1].split("```")[0]
    assert len(code.splitlines()) < 40
    path = tmp_path_factory.mktemp("task") / "my_task.py"
    path.write_text(code)
    return f"{path}:Reach"


@pytest.fixture(scope="session")
def arm(reach) -> str:
    """The same with one substep, in episodes of 12 steps."""
    file = reach.rpartition(":")[0]
    with open(file, "a") as f:
        f.write("\n\nclass Arm(Reach):\n    substeps = 1\n    max_episode_steps = 12\n")
        f.write("\n\nclass Learnable(Arm):\n    max_episode_steps = 60\n")
    return f"{file}:Arm"


@pytest.fixture(scope="session")
def learnable(arm) -> str:
    """The same in episodes of 60 steps: it runs fast uncompiled, and can be learned."""
    return arm.replace(":Arm", ":Learnable")
