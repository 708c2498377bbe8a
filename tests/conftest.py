import runpy
import sys

import pytest
import torch

from tests import ROOT

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a script in this process (importing torch takes seconds): it must exit with 2 and one line, returned."""

    def run(script: str, *args) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        said = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and len(said.splitlines()) == 1, said
        return said

    return run
