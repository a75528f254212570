import os
import subprocess
import sys
from pathlib import Path

from baton.cluster.children import Child, descendants

# A process that leaves a child which ignores SIGTERM and a grandchild whose parent is gone, then sweeps.
FAMILY = """
import os, subprocess, sys
from baton.cluster.children import adopt_orphans, descendants, sweep
adopt_orphans()
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
first = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
orphan = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
subprocess.run([sys.executable, "-c", orphan], check=True)
first.stdout.readline()
before = len(descendants(os.getpid()))
print(before, sweep(0.3), len(descendants(os.getpid())))
"""


def test_a_sweep_leaves_no_descendant_not_even_orphans_and_those_that_ignore_it() -> None:
    run = subprocess.run([sys.executable, "-c", FAMILY], capture_output=True, text=True, check=True)
    before, killed, after = map(int, run.stdout.split())
    assert (before, after) == (2, 0)
    assert killed >= 1


PARENT = """
import sys
from pathlib import Path
from baton.cluster.children import Child
folder = Path(sys.argv[1])
code = "import sys, time; print('up', flush=True); time.sleep(600)"
child = Child.start("c", [sys.executable, "-c", code], log=folder / "log")
while "up" not in (folder / "log").read_text():
    pass
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    os.set_blocking(pidfd, True)
    import select

    assert select.select([pidfd], [], [], 30)[0], "the child still runs"
    os.close(pidfd)


def test_a_child_says_how_it_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('what went wrong', file=sys.stderr); sys.exit(3)"]
    child = Child.start("c", command, log=tmp_path / "log")
    assert child.wait(30)
    assert child.poll() == 3
    assert child.last_lines(2) == "what went wrong"


def test_a_child_that_does_not_end_in_time_is_killed(tmp_path: Path) -> None:
    child = Child.start("c", [sys.executable, "-c", "import time; time.sleep(600)"], log=tmp_path / "log")
    assert not child.wait(0.01)
    assert child.poll() is not None
    assert child.pid not in descendants(os.getpid())
