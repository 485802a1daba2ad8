"""What a user installs, in environments of its own: ``make package`` builds it and names them.

``DIST`` is the folder of the wheel and the sdist, ``BARE`` the Python of an environment that has the wheel alone.
"""

import os
import subprocess
from pathlib import Path

import pytest

collect_ignore = [] if "BARE" in os.environ else ["test_package.py"]


class Environment:
    """An environment of a user, who is not in a clone of the repository.

    Parameters
    ----------
    python : path
        Its interpreter.
    folder : path
        Where commands run.
    """

    def __init__(self, python, folder):
        self.python, self.folder = Path(python).absolute(), folder

    def run(self, *words, check=True):
        """A command by the interpreter; what it printed stands in the error, too."""
        command = [str(word) for word in [self.python, *words]]
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.folder, env=variables)
        assert not check or ran.returncode == 0, ran.stdout + ran.stderr
        return ran

    def lococo(self, *words, check=True):
        """The command that was installed."""
        return self.run(self.python.with_name("lococo"), *words, check=check)

    def beside(self, folder):
        """A new environment that sees this one's packages and takes its own before them."""
        self.run("-m", "venv", folder)
        new = Environment(folder / "bin" / "python", self.folder)
        places = [place.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))") for place in (self, new)]
        theirs, own = (Path(place.stdout.strip()) for place in places)
        (own / "bare.pth").write_text(f"{theirs}\n")
        return new


@pytest.fixture(scope="session")
def dist():
    """Folder of the wheel and the sdist."""
    return Path(os.environ["DIST"]).absolute()


@pytest.fixture(scope="session")
def wheel(dist):
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """The environment that has the wheel alone."""
    return Environment(os.environ["BARE"], tmp_path_factory.mktemp("elsewhere"))
