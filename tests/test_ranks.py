"""Ranks: how they find one another, and that a rank which fails ends all, with one line that names it. tests/ranks.cpp
takes the place of a training."""
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-g", "-O0", "-pthread", os.path.join(ROOT, "tests", "ranks.cpp")]
LAUNCHERS = re.compile("^(OMPI|PMI|PMIX|MPI|SLURM|PBS|LSB|TORCHELASTIC)_"
                       "|^(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE)$")


def environment(**more):
    return {**{k: v for k, v in os.environ.items() if not LAUNCHERS.search(k)}, "ASAN_OPTIONS": "handle_segv=0", **more}


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """Built without MPI, under address and undefined sanitizers"""
    path = str(tmp_path_factory.mktemp("build") / "ranks")
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["g++", f"-I{ROOT}/cpu/no_mpi", *FLAGS, *sanitize, "-o", path], check=True)
    return path


@pytest.fixture(scope="session")
def with_mpi(tmp_path_factory):
    if not shutil.which("mpirun") or not shutil.which("mpicxx"):
        pytest.skip("needs mpirun and mpicxx (Debian: openmpi-bin, libopenmpi-dev)")
    path = str(tmp_path_factory.mktemp("build") / "ranks_mpi")
    subprocess.run(["mpicxx", *FLAGS, "-o", path], check=True)
    return path


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


class Run:
    """Processes that were started together; end() collects them."""
    def __init__(self, folder, commands, stderr=None):
        board = folder / f"board{time.monotonic_ns()}"
        board.write_bytes(bytes(64))
        self.start = time.time()
        self.errors = open(folder / f"{board.name}.err", "w+")
        self.processes = []
        for command, env in commands:
            words = [*command, *([] if "mpirun" in command[0] else [f"board={board}"])]
            self.processes.append(subprocess.Popen(words, env=env, text=True, stdout=subprocess.PIPE,
                                                   stderr=stderr or self.errors))

    def end(self, within=20):
        """Exit codes, the lines of olmoe on standard error, the lines on standard output. All have to end in time, and
        to leave nothing."""
        late = []
        for p in self.processes:
            try:
                p.wait(max(0.1, self.start + within - time.time()))
            except subprocess.TimeoutExpired:
                late.append(p.pid)
                p.kill()
        self.seconds = time.time() - self.start
        self.out = [line for p in self.processes for line in p.stdout.read().splitlines()]
        self.codes = [p.returncode for p in self.processes]
        self.errors.seek(0)
        text = self.errors.read()
        self.lines = [line for line in text.splitlines() if line.startswith("olmoe: ")]
        pids = [int(x) for x in re.findall(r"pid (\d+),", "\n".join(self.out))]
        left = [pid for pid in pids if lives(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not late and not left, (late, left, text)
        assert "Sanitizer" not in text and "runtime error" not in text, text
        return self


def shell(program, folder, n, *words, rendezvous=None, stderr=None, variables=None):
    """n ranks as a shell loop starts them"""
    meet = rendezvous or f"127.0.0.1:{free_port()}"
    numbers = variables or (lambda r: {"RANK": str(r), "WORLD_SIZE": str(n)})
    command = [program, f"rendezvous={meet}", *words]
    return Run(folder, [(command, environment(**numbers(r))) for r in range(n)], stderr)


MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n"]


def mpirun(program, folder, n, *words):
    return Run(folder, [([*MPIRUN, str(n), program, *words], environment())])


def started(run, n, by, word=123):
    """All n ranks printed who they are, received what rank 0 sent, and came to the end without an error."""
    assert run.codes == [0] * len(run.processes) and run.lines == [], (run.codes, run.lines)
    lines = sorted(line for line in run.out if line != "done")
    expected = [f"rank {r} of {n}, local {r} of {n}, pid N, by {by}, heard {word}" for r in range(n)]
    assert [re.sub(r"pid \d+", "pid N", line) for line in lines] == expected and run.out.count("done") == n


# ---------------------------------------------------------------------------------------------------------------------
# The start

@pytest.mark.parametrize("n", [2, 3])
def test_mpirun(with_mpi, tmp_path, n):
    started(mpirun(with_mpi, tmp_path, n, "mpi_only=1", "timeout=30", "steps=20").end(), n, "mpirun")


def test_one_rank(alone, with_mpi, tmp_path):
    for program in (alone, with_mpi):
        started(Run(tmp_path, [([program, "timeout=30", "steps=3"], environment())]).end(), 1, "alone")
    started(mpirun(with_mpi, tmp_path, 1, "timeout=30").end(), 1, "alone")
    meet = str(tmp_path / "meet")
    started(shell(alone, tmp_path, 1, "timeout=30", "steps=3", rendezvous=meet).end(), 1, f"rendezvous {meet}")


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("way", ["address", "file"])
def test_rendezvous(alone, tmp_path, way, n):
    meet = f"localhost:{free_port()}" if way == "address" else str(tmp_path / "meet")
    started(shell(alone, tmp_path, n, "timeout=30", "steps=20", rendezvous=meet).end(), n, f"rendezvous {meet}")
    assert not [name for name in os.listdir(tmp_path) if "meet" in name]


def test_rendezvous_without_watch(alone, tmp_path):
    meet = str(tmp_path / "meet")
    started(shell(alone, tmp_path, 2, "steps=5", rendezvous=meet).end(), 2, f"rendezvous {meet}")


def pair(program, folder, meet, late, seconds):
    """Two ranks, of which one begins so many seconds later"""
    words = [program, f"rendezvous={meet}", "timeout=30", "steps=5"]
    return Run(folder, [([*words, f"late={seconds * (r == late)}"], environment(RANK=str(r), WORLD_SIZE="2"))
                        for r in (0, 1)])


@pytest.mark.parametrize("late", [0, 1])
def test_who_comes_first(alone, tmp_path, late):
    meets = [f"127.0.0.1:{free_port()}", str(tmp_path / "meet")]
    runs = [pair(alone, tmp_path, meet, late, 0.5) for meet in meets]
    for meet, run in zip(meets, runs):
        started(run.end(), 2, f"rendezvous {meet}")


VARIABLES = {
    "srun": lambda r: dict(SLURM_JOB_ID="7", SLURM_STEP_ID="0", SLURM_PROCID=str(r), SLURM_NTASKS="9",
                           SLURM_STEP_NUM_TASKS="2", SLURM_LOCALID=str(r)),
    "older srun": lambda r: dict(SLURM_STEP_ID="0", SLURM_PROCID=str(r), SLURM_NTASKS="2"),
    "torchrun below srun": lambda r: dict(RANK=str(r), WORLD_SIZE="2", LOCAL_RANK=str(r), SLURM_STEP_ID="0",
                                          SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1"),
    "a loop in a batch script": lambda r: dict(RANK=str(r), WORLD_SIZE="2", SLURM_JOB_ID="7", SLURM_PROCID="0",
                                               SLURM_NTASKS="1"),
    "mpirun of another MPI": lambda r: dict(PMI_RANK=str(r), PMI_SIZE="2", MPI_LOCALRANKID=str(r)),
    "Open MPI's": lambda r: dict(OMPI_COMM_WORLD_RANK=str(r), OMPI_COMM_WORLD_SIZE="2",
                                 OMPI_COMM_WORLD_LOCAL_RANK=str(r)),
}


@pytest.mark.parametrize("launcher", VARIABLES)
def test_variables_of_launchers(alone, tmp_path, launcher):
    meet = str(tmp_path / "meet")
    run = shell(alone, tmp_path, 2, "timeout=30", "steps=2", rendezvous=meet, variables=VARIABLES[launcher])
    started(run.end(), 2, f"rendezvous {meet}")


def test_local_rank_is_the_launchers(alone, tmp_path):
    exchanged = lambda r: dict(RANK=str(r), WORLD_SIZE="2", LOCAL_RANK=str(1 - r))
    run = shell(alone, tmp_path, 2, variables=exchanged).end()
    assert sorted(line.split(",")[1] for line in run.out if line != "done") == [" local 0 of 2", " local 1 of 2"]
    assert any(line.startswith("rank 0 of 2, local 1 of 2") for line in run.out)


def test_stale_file(alone, tmp_path):
    """What an earlier run left is not taken, also by a rank that is there before rank 0."""
    stranger = socket.socket()
    stranger.bind(("127.0.0.1", 0))
    stranger.listen()
    line = "olmoe-rendezvous 77 {} {} 127.0.0.1 end\n"
    stale = {"closed port": line.format(free_port(), "job::::"),
             "stranger's port": line.format(stranger.getsockname()[1], "job::::"),
             "other job": line.format(free_port(), "job:8:::"), "damaged": "olmoe-rendezvous 77 4", "empty": ""}
    runs = {}
    for name, text in stale.items():
        (tmp_path / name).write_text(text)
        runs[name] = pair(alone, tmp_path, tmp_path / name, 0, 0.6)
    connection = stranger.accept()[0]
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(1000))
    connection.close()
    stranger.close()
    for name, run in runs.items():
        started(run.end(), 2, f"rendezvous {tmp_path / name}")
        assert not (tmp_path / name).exists()


def test_two_jobs_at_one_address(alone, tmp_path):
    """Rank 1 of job 8 comes to rank 0 of job 7, is sent away, and waits for its own."""
    meet = f"127.0.0.1:{free_port()}"

    def rank(r, job, late):
        words = [alone, f"rendezvous={meet}", "timeout=30", f"late={late}", f"word={job}"]
        return words, environment(RANK=str(r), WORLD_SIZE="2", SLURM_JOB_ID=str(job))

    first = Run(tmp_path, [rank(0, 7, 0), rank(1, 7, 0.6)])
    second = Run(tmp_path, [rank(0, 8, 1.2), rank(1, 8, 0.3)])
    for job, run in ((7, first), (8, second)):
        started(run.end(), 2, f"rendezvous {meet}", job)


def test_strangers_at_the_address(alone, tmp_path):
    port = free_port()
    run = pair(alone, tmp_path, f"127.0.0.1:{port}", 1, 1)
    strangers = []
    for sent in (b"", b"GET / HTTP/1.1\r\n\r\n", b"x" * 5000, b"olmoe>1\0" + bytes(2000)):
        for _ in range(100):
            try:
                strangers.append(socket.create_connection(("127.0.0.1", port)))
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        strangers[-1].sendall(sent)
    for s in strangers[1:]:
        s.close()
    started(run.end(), 2, f"rendezvous 127.0.0.1:{port}")
    strangers[0].close()


# ---------------------------------------------------------------------------------------------------------------------
# Refusals

def refused(run, *words):
    run.end()
    assert 0 not in run.codes and len(run.lines) == 1, (run.codes, run.lines)
    for word in words:
        assert word in run.lines[0], run.lines[0]


ANNOUNCED = {
    "OMPI_COMM_WORLD_SIZE": dict(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0"),
    "PMI_SIZE": dict(PMI_RANK="0", PMI_SIZE="2"),
    "PMIX_RANK": dict(PMIX_RANK="1"),
    "SLURM_STEP_NUM_TASKS": dict(SLURM_PROCID="0", SLURM_NTASKS="4", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_ID="0"),
    "SLURM_NTASKS": dict(SLURM_PROCID="1", SLURM_NTASKS="2"),
    "WORLD_SIZE": dict(WORLD_SIZE="2", RANK="0"),
}


@pytest.mark.parametrize("variable", ANNOUNCED)
def test_several_ranks_alone(alone, with_mpi, tmp_path, variable):
    """Variables announce several ranks, the program finds one: never two trainings in one directory."""
    for program in [alone] + [with_mpi] * (not variable.startswith("OMPI")):       # Open MPI itself refuses the latter
        for only in ("0", "1"):
            run = Run(tmp_path, [([program, f"mpi_only={only}"], environment(**ANNOUNCED[variable]))])
            refused(run, variable + "=", "mpirun", "srun --mpi=pmix", "unset " + variable)
            assert ("--rendezvous" in run.lines[0]) == (only == "0")


def test_mpirun_of_a_program_without_mpi(alone, with_mpi, tmp_path):
    refused(mpirun(alone, tmp_path, 2), "OMPI_COMM_WORLD_SIZE=2")


ONE_RANK = {
    "salloc": dict(SLURM_JOB_ID="7", SLURM_NTASKS="4"),
    "batch script": dict(SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0"),
    "batch step": dict(SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_STEP_ID="4294967291"),
    "interactive step": dict(SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_STEP_ID="4294967290"),
    "srun -n 1": dict(SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_STEP_ID="0",
                      SLURM_STEP_NUM_TASKS="1"),
    "torchrun of one": dict(RANK="0", WORLD_SIZE="1"),
    "not numbers": dict(WORLD_SIZE="two", RANK=""),
}


@pytest.mark.parametrize("case", ONE_RANK)
def test_one_rank_is_right(alone, tmp_path, case):
    started(Run(tmp_path, [([alone, "steps=1"], environment(**ONE_RANK[case]))]).end(), 1, "alone")


def test_mpirun_below_slurm(with_mpi, tmp_path):
    """Open MPI's mpirun starts its daemons by srun, whose variables the ranks inherit."""
    variables = ["env", "SLURM_PROCID=0", "SLURM_STEP_ID=0", "SLURM_STEP_NUM_TASKS=3"]
    run = Run(tmp_path, [([*MPIRUN, "2", *variables, with_mpi, "timeout=30", "steps=3"], environment())])
    started(run.end(), 2, "mpirun")


def test_rendezvous_refusals(alone, tmp_path):
    def one(rank, size, meet, *words):
        variables = {"RANK": rank, "WORLD_SIZE": size} if rank else {}
        return Run(tmp_path, [([alone, f"rendezvous={meet}", "patience=0.5", *words], environment(**variables))])

    port = free_port()
    refused(one("0", "2", f"127.0.0.1:{port}", "mpi_only=1"), f"--rendezvous 127.0.0.1:{port}", "MPI", "mpirun")
    refused(one("", "", f"127.0.0.1:{port}"), "RANK and WORLD_SIZE")
    refused(one("2", "2", f"127.0.0.1:{port}"), "RANK and WORLD_SIZE")
    refused(one("0", "2", "127.0.0.1:0"), "port")
    refused(one("0", "2", "127.0.0.1:65536"), "port")
    refused(one("0", "3", f"127.0.0.1:{port}"), "ranks 1, 2 of 3 did not come", str(port))
    refused(one("1", "2", f"127.0.0.1:{port}"), "rank 0 did not answer rank 1 of 2")
    refused(one("1", "2", str(tmp_path / "none")), "rank 0 did not answer")
    refused(one("0", "2", str(tmp_path / "no" / "such")), "No such file")
    refused(one("0", "2", f"{tmp_path}/"), "rendezvous")
    (tmp_path / "data.npy").write_bytes(bytes(range(1, 99)))
    refused(one("0", "2", str(tmp_path / "data.npy")), "data.npy", "another kind")
    assert (tmp_path / "data.npy").read_bytes() == bytes(range(1, 99))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        refused(one("0", "2", f"127.0.0.1:{s.getsockname()[1]}"), "cannot listen", "in use")


@pytest.mark.parametrize("second", [("2", "3"), ("1", "3"), ("1", "2")])
def test_ranks_that_do_not_fit(alone, tmp_path, second):
    """Another number of ranks; or a second rank 1."""
    meet = str(tmp_path / "meet")
    numbers = [("0", "2"), second] if second != ("1", "2") else [("0", "3"), ("1", "3"), ("1", "3")]
    words = [alone, f"rendezvous={meet}", "patience=3"]
    run = Run(tmp_path, [(words, environment(RANK=r, WORLD_SIZE=n)) for r, n in numbers]).end()
    assert 0 not in run.codes and len(run.lines) >= 1
    reason = "two processes are rank 1" if len(numbers) == 3 else f"rank {second[0]} of 3"
    assert any(reason in line for line in run.lines), run.lines


# ---------------------------------------------------------------------------------------------------------------------
# The watch. Ranks act before collective 7, which is of layer 3; the one before was of layer 2.

TIMEOUT = 1.2
# What became of the rank, and what the rank that reports it did
ACTS = {
    "kill": ("is gone", "was"),
    "crash": ("is gone", "was"),
    "stop": (f"has not answered for {TIMEOUT} s", "is"),
    "spin": (f"has stood still for {TIMEOUT} s", "waits"),
}


def line_of(act, who, pid, other):
    became, did = ACTS[act]
    place = f"pid {pid} on {socket.gethostname()}, last heard at the all-reduce of layer 2"
    return f"olmoe: rank {who} {became} ({place}); rank {other} {did} at the all-reduce of layer 3"


def fails(run, act, who, bound):
    """One line that names rank and collective; all end in time, and none with 0."""
    run.end(within=bound)
    assert 0 not in run.codes and len(run.lines) == 1, (run.codes, run.lines)
    pid = next(int(line.split("pid ")[1].split(",")[0]) for line in run.out if line.startswith(f"rank {who} "))
    # Any other rank may report rank 0, because all see it at the same time.
    others = [0] if who else range(1, max(len(run.codes), 2))
    assert run.lines[0] in [line_of(act, who, pid, other) for other in others]
    assert "done" not in run.out
    if len(run.codes) > 1:
        others = [code for rank, code in enumerate(run.codes) if rank != who]
        assert others == [1] * len(others)
        code = {"kill": -signal.SIGKILL, "crash": -signal.SIGSEGV, "stop": -signal.SIGKILL, "spin": 1}[act]
        assert run.codes[who] == code


@pytest.mark.parametrize("act", ACTS)
def test_failure(alone, tmp_path, act):
    bound = (0 if act in ("kill", "crash") else TIMEOUT) + 6
    words = (f"timeout={TIMEOUT}", "steps=1000", "at=7", f"act={act}")
    runs = [shell(alone, tmp_path, 3, *words, f"who={who}") for who in (0, 1)]
    for who in (0, 1):
        fails(runs[who], act, who, bound)


@pytest.mark.parametrize("act", ["kill", "stop", "spin"])
def test_failure_below_mpirun(with_mpi, tmp_path, act):
    words = (f"timeout={TIMEOUT}", "steps=1000", "at=7", f"act={act}")
    runs = [mpirun(with_mpi, tmp_path, 2, *words, f"who={who}") for who in (0, 1)]
    for who in (0, 1):
        fails(runs[who], act, who, TIMEOUT + 10)


def test_gone_is_noticed_at_once(alone, tmp_path):
    """However long the timeout"""
    words = ("timeout=600", "steps=1000", "at=7", "act=kill")
    runs = [shell(alone, tmp_path, 2, *words, f"who={who}") for who in (0, 1)]
    for who in (0, 1):
        fails(runs[who], "kill", who, 8)


def test_several_at_fault(alone, tmp_path):
    """Two stopped: rank 2 reports rank 0, and both are ended. Two hang; all hang."""
    stopped, some, every = [shell(alone, tmp_path, 3, f"timeout={TIMEOUT}", "steps=1000", *words)
                            for words in (("at=7", "who=0,1", "act=stop"), ("at=7", "who=1,2", "act=hang"),
                                          ("at=0", "who=0,1,2", "act=hang"))]
    assert some.end(within=TIMEOUT + 6).codes == [1, 1, 1]
    assert some.lines == [f"olmoe: ranks 1, 2 have stood still for {TIMEOUT} s, last at the all-reduce of layer 2; "
                          "rank 0 waits at the all-reduce of layer 3"]
    assert every.end(within=TIMEOUT + 6).codes == [1, 1, 1]
    assert every.lines == [f"olmoe: all 3 ranks have stood still for {TIMEOUT} s, before the first collective"]
    assert stopped.end(within=TIMEOUT + 6).codes == [-signal.SIGKILL, -signal.SIGKILL, 1]
    assert len(stopped.lines) == 1 and f"rank 0 has not answered for {TIMEOUT} s" in stopped.lines[0]


def test_error_of_a_library(alone, tmp_path):
    """What a library finds out while the main thread waits is the one line, and ends all."""
    for who in (0, 1):
        run = shell(alone, tmp_path, 3, "timeout=60", "steps=1000", "at=7", f"who={who}", "act=library")
        assert run.end(within=8).codes == [1, 1, 1]
        assert run.lines == [f"olmoe: rank {who} at the all-reduce of layer 2: a library: link down"]


def test_die_is_the_only_line(alone, tmp_path):
    """The error of the rank that dies is the only line; where all die, rank 0's."""
    words = ("timeout=4", "steps=1000", "at=7", "act=die")
    runs = {who: shell(alone, tmp_path, 3, *words, f"who={who}") for who in ("0", "2", "0,1,2")}
    for who, run in runs.items():
        assert run.end(within=9).codes == [1, 1, 1]
        assert run.lines == [f"olmoe: {'rank 2: ' if who == '2' else ''}token 7 has id 99999; check the data"]


def test_exit_without_leave(alone, tmp_path):
    run = shell(alone, tmp_path, 2, "timeout=5", "steps=1000", "at=7", "who=1", "act=exit").end(within=8)
    assert run.codes == [1, 1] and "done" not in run.out


def test_slow_rank_is_left_alone(alone, tmp_path):
    runs = [shell(alone, tmp_path, 2, f"timeout={timeout}", "steps=20", "at=7", "who=1", f"act={act}")
            for act, timeout in (("slow", 2), ("alive", 1), ("slow", 0))]
    for run in runs:
        run.end()
        assert run.codes == [0, 0] and run.lines == [] and run.out.count("done") == 2


def test_all_leave_together(alone, tmp_path):
    """A rank that has come to the end waits for the others, and fails with them."""
    slow, gone = [shell(alone, tmp_path, 3, "timeout=2", "steps=5", "at=5", "who=1", f"act={act}")
                  for act in ("slow", "kill")]
    assert slow.end().codes == [0, 0, 0] and slow.lines == []
    assert gone.end().codes == [1, -signal.SIGKILL, 1] and len(gone.lines) == 1 and "done" not in gone.out
    assert gone.lines[0].startswith("olmoe: rank 1 is gone")
    assert gone.lines[0].endswith("rank 0 was at the end of the run")


def test_suspended_job_goes_on(alone, tmp_path):
    """All are stopped for longer than the timeout, as Slurm suspends a job."""
    run = shell(alone, tmp_path, 3, "timeout=1", "steps=500")
    time.sleep(0.7)
    assert [p.poll() for p in run.processes] == [None] * 3
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for p in run.processes:
            p.send_signal(number)
        time.sleep(1.5)
    run.end()
    assert run.codes == [0, 0, 0] and run.lines == [], run.lines


def test_nobody_reads_standard_error(alone, tmp_path):
    """A pipe that is full does not keep the ranks from ending."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, bytes(4096))
    except BlockingIOError:
        pass
    os.set_blocking(writing, True)
    run = shell(alone, tmp_path, 2, f"timeout={TIMEOUT}", "steps=1000", "at=7", "who=1", "act=kill", stderr=writing)
    run.end(within=9)
    os.close(reading)
    os.close(writing)
    assert run.codes == [1, -signal.SIGKILL]
