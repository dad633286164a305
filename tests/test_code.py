"""Judge code: programs as models write them, and programs that mean harm."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opd_stream.config import Evaluation
from opd_stream.errors import UserError
from opd_stream.sources import read_prompts
from opd_stream.tasks import isolation
from opd_stream.tasks.code import program_of, read_task
from opd_stream.tasks.isolation import Limits, Program, check_isolation, passes
from opd_stream.tasks.judges import CodeJudge, judge_recipe, open_judge
from pipeline.run_folder import RunFolder
from pipeline.single_stage import run_evaluation
from stages.step import Silent
from tests.conftest import small_config

HUMANEVAL = {
    "task_id": "HumanEval/x",
    "prompt": "from typing import List\n\ndef one_more(x):\n    return x + 1\n\n"
    'def raised(xs: List[int]) -> List[int]:\n    """Add one.\n    >>> raised([1])\n    """\n',
    "entry_point": "raised",
    "canonical_solution": "    return [one_more(x) for x in xs]\n",
    "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate([1, 2]) == [2, 3]\n"
    "    assert one_more(1) == 2\n",
}
MBPP = {
    "text": "Write a function to add one.",
    "code": "def raised(x):\n    return x + 1",
    "test_list": ["assert raised(1) == 2", "assert raised(-1) == 0"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
TESTS = "assert raised(1) == 2\nassert raised(-1) == 0"
QUICK = Limits(cpu_seconds=1, wall_seconds=30, memory_mib=256, files_mib=4)


@pytest.fixture(scope="module")
def isolated() -> None:
    try:
        check_isolation(Limits())
    except UserError as error:
        pytest.skip(f"no program can be isolated here: {error}")


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No process of a program is alive after it."""
    yield
    left = [each for each in Path("/proc").glob("[0-9]*") if b"isolated.py" in _command(each)]
    assert not left


def _command(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_published_rows_are_prompts_and_tests(tmp_path: Path) -> None:
    rows = {"humaneval": HUMANEVAL, "mbpp": MBPP}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    benchmarks = {
        name: {
            "format": name,
            "judge": {"allow_code_execution": True},
            "prompts": {"kind": "jsonl", "path": tmp_path / f"{name}.jsonl"},
        }
        for name in rows
    }
    parts = Evaluation.model_validate({"max_new_tokens": 8, "benchmarks": benchmarks}).parts()
    assert all(
        part.judge == CodeJudge(kind="code", allow_code_execution=True) for part in parts.values()
    )
    (human,), (mbpp,) = (
        read_prompts(part.prompts) for part in parts.values() if part.prompts is not None
    )
    assert human.text == HUMANEVAL["prompt"]
    assert mbpp.text == f"{MBPP['text']}\nYour code should pass these tests:\n{TESTS}"
    tasks = [read_task(str(each.answer)) for each in (human, mbpp)]
    assert [task and task.names for task in tasks] == [{"raised"}, {"raised"}]
    assert [task and task.tests for task in tasks] == [HUMANEVAL["test"], TESTS]


H, M = json.dumps(HUMANEVAL), json.dumps(MBPP)
WITH_IMPORT = json.dumps({**MBPP, "test_imports": ["import math"]})


@pytest.mark.parametrize(
    ("reference", "completion", "right"),
    [
        (H, "    return [one_more(x) for x in xs]\n", True),
        (H, "    return xs\n", False),
        (H, "    ys = [x + 1 for x in xs]\n\n    return ys\n\ndef test():\n    cut off (\n", True),
        (H, "return [x + 1 for x in xs]", True),  # its first indentation was stripped
        (H, "```python\ndef raised(xs: List[int]):\n    return [*map(one_more, xs)]\n```", True),
        (H, "```python\ndef raised(x):\n    return [2, 3]\n```\nUse:\n```\nraised(1)\n```", True),
        (H, "```\n    return [x + 1 for x in xs]\n```", True),
        (H, "<think>```\ndef raised(x): pass\n```</think>    return [x + 1 for x in xs]", True),
        (H, "    return [x + 1 for x in xs]\n```\n\nThis function adds one.", True),
        (H, "def raised(x):\n    return [2, 3]\n```\n\nThis function adds one.", True),
        (H, " Here it is:\n```\n    return [x + 1 for x in xs]\n```", True),
        (H, "I cannot do that.", False),
        (H, "", False),
        (M, "def raised(x):\n    return x + 1", True),
        (M, "def raised(x):\n    return 2", False),
        (M, "Here:\n```py\ndef raised(x):\n    return x + 1\n", True),  # the fence is cut off
        (M, "def raised(x):\n    return x +", False),
        (M, "def raised(x): return x + 1\nif __name__ == '__main__': raised(input())", True),
        (WITH_IMPORT, "raised = lambda x: math.ceil(x+1)", True),
        (json.dumps(MBPP["test_list"]), "def raised(x): return x + 1", True),
        (TESTS, "def raised(x): return x + 1", True),
    ],
)  # fmt: skip
def test_programs_as_models_write_them(
    isolated: None, reference: str, completion: str, right: bool
) -> None:
    task = read_task(reference)
    assert task is not None
    assert passes(program_of(completion, task), QUICK) is right


def test_a_reference_without_an_assertion_cannot_be_read() -> None:
    no_check = json.dumps({**HUMANEVAL, "test": "assert True"})
    for reference in ("", "18", "see below", "[]", "{}", "assert (", "print(1)", no_check):
        assert read_task(reference) is None, reference


SAFE = "assert not reached, reached"
ATTEMPT = """
reached = []
def attempt(name, do):
    try:
        do()
        reached.append(name)
    except (OSError, ImportError):
        pass
"""


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        (
            "import socket\n"
            "attempt('out', lambda: socket.create_connection(('1.1.1.1', 53), timeout=1))\n"
            "attempt('machine', lambda: socket.create_connection(('127.0.0.1', PORT), timeout=1))\n"
            "attempt('unix', lambda: socket.socket(socket.AF_UNIX).connect('/run/x'))",
            SAFE,
        ),
        (
            "for path in ('/evil', EVIL, '/usr/evil', '/dev/shm/x', '/etc/passwd', HERE):\n"
            "    attempt(path, lambda: open(path, 'a').write('x'))\n"
            "open('own', 'w').write('x')",
            SAFE,
        ),
        (
            "import os\n"
            "for path in ('/proc/1/environ', '/proc/self/environ', '/etc/passwd', HERE):\n"
            "    attempt(path, lambda: open(path).read())\n"
            "secret = any('secret' in each for pair in os.environ.items() for each in pair)",
            SAFE + "\nassert not secret",
        ),
        (
            "import os, signal\n"
            "attempt('machine', lambda: os.kill(OUTSIDE, 0))\n"
            "attempt('rights', lambda: os.setuid(0 if os.getuid() else 1))",
            SAFE,
        ),
        (
            "import ctypes\nc = ctypes.CDLL(None)\n"
            "c.unshare(0x10020000)\n"
            "reached = [c.mount(b'a', b'/usr', b'tmpfs', 0, None), c.umount2(b'/usr', 2)]",
            "assert reached == [-1, -1]",
        ),
        (
            "import os, time\nstarted = 0\ntry:\n    while started < 100:\n"
            "        if not os.fork():\n            time.sleep(60)\n        started += 1\n"
            "except OSError:\n    pass",
            "assert 1 < started < 20",
        ),
        (
            "import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork():\n"
            "        time.sleep(60)\n    os._exit(0)",
            "assert True",
        ),
    ],
    ids=["sockets", "writes", "secrets", "kills", "mounts", "forks", "daemon"],
)
def test_a_program_reaches_nothing_outside(
    isolated: None,
    nothing_left: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    tests: str,
) -> None:
    """These programs pass: the tests say that every attempt has failed."""
    tmp_path.chmod(0o777)
    evil = tmp_path / "evil"
    monkeypatch.setenv("HF_TOKEN", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        known = f"PORT, HERE, EVIL, OUTSIDE = {(port, __file__, str(evil), os.getpid())}\n"
        assert passes(Program(code=known + ATTEMPT + code, tests=tests), QUICK)
    assert not evil.exists()


# A right answer, and then harm.
HOSTILE = {
    "memory": "block = bytearray(10**10)",
    "memory in pieces": "blocks = []\nwhile True: blocks.append('a' * 10**6)",
    "a big file": "with open('big', 'wb') as file:\n    while True: file.write(bytes(10**6))",
    "many files": "for n in range(10**5): open(str(n), 'wb').write(bytes(10**5))",
    "exit": "import sys\nsys.exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "exit in a thread": "import threading, os\n"
    "threading.Thread(target=lambda: os._exit(0)).start()\nwhile True: pass",
    "end itself": "import os\nos.kill(os.getpid(), 9)",
    "say so everywhere": "import os\nfor number in range(64):\n"
    "    try: os.write(number, b'passed')\n    except OSError: pass",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    "a null pointer": "import ctypes\nctypes.string_at(0)",
    "other builtins": "import builtins\nbuiltins.abs = lambda x: 0\nabs = lambda x: 0\nraised = id",
    "equal to all": "class Same:\n    def __eq__(self, other): return True\n"
    "raised = lambda x: Same()",
    "a number equal to all": "class Same(int):\n    def __eq__(self, other): return True\n"
    "raised = lambda x: Same()",
    "raise": "raised = lambda x: 1 / 0",
    "a null character": "\x00",
    "depth": "(" * 5000,
}
ENDLESS = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "sleep": "import time\ntime.sleep(60)",
    "loop": "while True: pass",
}


@pytest.mark.parametrize("name", [*HOSTILE, *ENDLESS])
def test_a_hostile_program_is_survived_and_wrong(
    isolated: None, nothing_left: None, name: str
) -> None:
    limits = replace(QUICK, wall_seconds=1) if name in ENDLESS else QUICK
    tests = "assert abs(-2) == 2\nassert raised(1) == 2\nassert [raised(1)] == [2]"
    harm = {**HOSTILE, **ENDLESS}[name]
    assert not passes(Program(code=f"raised = lambda x: x + 1\n{harm}", tests=tests), limits)


def test_time_of_the_processor_ends_a_loop_long_before_the_wall(isolated: None) -> None:
    started = time.monotonic()
    assert not passes(Program(code="while True: pass", tests=""), replace(QUICK, wall_seconds=300))
    assert time.monotonic() - started < 60


def test_a_gigabyte_of_output_is_no_harm(isolated: None) -> None:
    code = "import os\nfor _ in range(1000): os.write(1, bytes(10**6))"
    assert passes(Program(code=code, tests="assert True"), QUICK)


def test_a_class_of_the_program_may_be_equal_to_its_own_kind(isolated: None) -> None:
    code = (
        "from fractions import Fraction\nfrom collections import Counter\n"
        "from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: int"
    )
    tests = (
        "assert Point(1) == Point(1)\nassert Fraction(1, 2) == 0.5\nassert Counter('aab') == "
        "{'a': 2, 'b': 1}\nassert {'a': 1}.keys() == {'a'}\n"
        "assert {1: [Point(1)]} == {1: [Point(1)]}\nassert {1, 2} == {2, 1}"
    )
    assert passes(Program(code=code, tests=tests), QUICK)


LIMITS = replace(QUICK, isolation="limits")


@pytest.fixture(scope="module")
def limited() -> Iterator[None]:
    """Root's own Python may be closed to the user that a program becomes; the system's is not."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            check_isolation(LIMITS)
        except UserError as error:
            if not (python := shutil.which("python3", path="/usr/bin")):
                pytest.skip(f"no program can be limited here: {error}")
            code = "import sys; print(sys.base_prefix, *sys.path[1:], sep='\\n')"
            command = [python, "-I", "-S", "-c", code]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            prefix, *paths = said.splitlines()
            patch.setattr(sys, "executable", python)
            patch.setattr(sys, "base_prefix", prefix)
            patch.setattr(isolation, "_libraries", lambda: [p for p in paths if Path(p).is_dir()])
        try:
            check_isolation(LIMITS)
        except UserError as error:
            pytest.skip(f"no program can be limited here: {error}")
        yield
    check_isolation.cache_clear()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("fork bomb", "raise") else [pytest.mark.slow])
        for name in (*HOSTILE, *ENDLESS)
    ],
)
def test_without_namespaces_a_hostile_program_is_survived_too(
    limited: None, nothing_left: None, name: str
) -> None:
    harm = {**HOSTILE, **ENDLESS}[name]
    limits = replace(LIMITS, wall_seconds=1) if name in ENDLESS else LIMITS
    tests = "assert abs(-2) == 2\nassert raised(1) == 2\nassert [raised(1)] == [2]"
    assert not passes(Program(code=f"raised = lambda x: x + 1\n{harm}", tests=tests), limits)


def test_without_namespaces_there_is_no_socket_and_no_signal(
    limited: None, nothing_left: None
) -> None:
    code = f"""
import os, resource, socket, time
attempt("inet", socket.socket)
attempt("unix", lambda: socket.socket(socket.AF_UNIX))
attempt("all", lambda: os.kill(-1, 9))
attempt("machine", lambda: os.kill({os.getpid()}, 0))
attempt("limits", lambda: resource.prlimit({os.getpid()}, resource.RLIMIT_CPU))
socket.socketpair()
own = resource.prlimit(0, resource.RLIMIT_CORE)
if not os.fork():
    os.setsid()
    if not os.fork():
        time.sleep(60)
    os._exit(0)
"""
    assert passes(Program(code=ATTEMPT + code, tests=SAFE), LIMITS)


def test_verdicts_are_in_order_however_many_run_at_once(isolated: None) -> None:
    judge = open_judge(CodeJudge(kind="code", allow_code_execution=True, at_once=3))
    slow = "import time\ntime.sleep(0.3)\n"
    bodies = [(slow if n % 2 else "") + f"def raised(x): return x + {n % 3}" for n in range(6)]
    assert judge.verdicts([(body, TESTS) for body in bodies]) == [n % 3 == 1 for n in range(6)]
    assert judge.unreadable([TESTS, None, "18"]) == [1, 2]


def test_a_machine_that_cannot_isolate_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "refused.py"
    script.write_text("import os, sys\nos.write(int(sys.argv[1]), b'OSError: unshare: refused')")
    monkeypatch.setattr(isolation, "_SCRIPT", script)
    settings = CodeJudge(kind="code", allow_code_execution=True, cpu_seconds=77)
    with pytest.raises(
        UserError, match=r"\(OSError: unshare: refused\).* isolation=limits"
    ) as error:
        open_judge(settings)
    assert "\n" not in str(error.value)


def test_what_decides_a_verdict_is_in_its_recipe_and_nothing_else() -> None:
    allowed = CodeJudge(kind="code", allow_code_execution=True, at_once=9)
    assert judge_recipe(allowed) == judge_recipe(CodeJudge(kind="code"))
    assert judge_recipe(CodeJudge(kind="code", cpu_seconds=3)) != judge_recipe(allowed)


def test_an_evaluation_runs_programs_only_where_it_may(
    tmp_path: Path, isolated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{M}\n{json.dumps({**MBPP, 'test_list': []})}\n")
    rows = {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl")}
    benchmark: dict[str, Any] = {"format": "mbpp", "prompts": rows, "judge": {"at_once": 2}}
    asked = {"max_new_tokens": 4, "samples_per_prompt": 2, "benchmarks": {"mbpp": benchmark}}

    def said() -> str:
        config = small_config(tmp_path, f"evaluation={json.dumps(asked)}")
        folder = RunFolder(tmp_path / "run")
        return run_evaluation(config, folder, policy_version=0, progress=Silent())

    with pytest.raises(UserError, match="allow_code_execution of the judge is false") as caught:
        said()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store" / "rollouts").exists()
    benchmark["judge"]["allow_code_execution"] = True
    assert said().startswith("mbpp: pass@1 0.000 [0.000, 0.")
    assert "1 problems, 1 left out for their references × 2 samples" in said()
