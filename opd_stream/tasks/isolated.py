"""The child that runs a program and its tests: a script, which `isolation.py` starts.

Three processes. The first moves into namespaces of its own: no network, no other processes, an
empty file system with the Python library in it, read-only. The second is the first process of
these: the kernel ends everything in there when it ends, daemons included. The third gives up its
rights, takes its limits, and runs program and tests in one interpreter. Only a marker that is
written behind the last test means success; an exit code or silence does not.

With isolation `limits` there are no namespaces: the system calls that open a socket or reach
another process are refused instead, and what is left over is found and killed.
"""

import ast
import builtins
import ctypes
import json
import os
import random
import resource
import signal
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NoReturn

NEW_USER = 0x10000000
NEW_NAMESPACES = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1 | MS_NOSUID | MS_NODEV
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin")  # libraries that the interpreter loads
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
PDEATHSIG, SUBREAPER, NO_NEW_PRIVILEGES, DROP_FROM_BOUND = 1, 36, 38, 24  # of prctl
CAPABILITIES_V3 = 0x20080522
HIGHEST_ID = 2_000_000_000  # of a user who owns nothing; a container may map fewer

# Machine -> its number in seccomp, and the numbers of calls: socket, io_uring_setup, bpf, kill,
# tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal, pidfd_getfd, ptrace,
# process_vm_readv, process_vm_writev, process_madvise, perf_event_open, unshare, setns; prlimit64.
REFUSED = {
    "x86_64": (
        0xC000003E,
        (41, 425, 321, 62, 200, 234, 129, 297, 424, 438, 101, 310, 311, 440, 298, 272, 308),
        302,
    ),
    "aarch64": (
        0xC00000B7,
        (198, 425, 280, 129, 130, 131, 138, 240, 424, 438, 117, 270, 271, 440, 241, 97, 268),
        261,
    ),
}
X32 = 0x40000000  # the bit of calls of another convention, refused too
SECCOMP, FILTER = 22, 2  # of prctl
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # of the filter's machine
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # REFUSE: EPERM

libc: Any = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Read a job from standard input, run it, and end whatever it leaves behind."""
    job = json.loads(sys.stdin.buffer.read())
    status, verdict = map(int, sys.argv[1:])
    signal.signal(signal.SIGALRM, lambda _number, _frame: os._exit(1))
    signal.setitimer(signal.ITIMER_REAL, job["wall_seconds"] + 5)
    try:
        call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        user = nobody() if os.getuid() == 0 else None
        if job["isolation"] == "namespaces":
            into_namespaces(user)
            run_as_first(job, user, status, verdict)
        else:
            call("prctl", SUBREAPER, 1, 0, 0, 0)
            run_in_folder(job, user, status, verdict)
    except Exception as error:
        os.write(status, f"{type(error).__name__}: {error}"[:300].encode())


def nobody() -> int:
    """The id of a user who most likely has no process and no file, of those that exist here."""
    with open("/proc/self/uid_map") as file:
        ranges = [list(map(int, line.split())) for line in file]
    last = min(HIGHEST_ID, max(first + count for first, _, count in ranges))
    return random.randint(last * 9 // 10, last - 3)


def call(name: str, *arguments: Any) -> None:
    """A function of the C library; an OSError that names it where it fails."""
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def into_namespaces(user: int | None) -> None:
    """Leave network, processes, mounts and IPC of the machine; a user becomes root inside."""
    identity = (os.getuid(), os.getgid())
    call("unshare", NEW_NAMESPACES | (NEW_USER if user is None else 0))
    if user is None:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{identity[0]} {identity[0]} 1"),
            ("gid_map", f"{identity[1]} {identity[1]} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def run_as_first(job: dict[str, Any], user: int | None, status: int, verdict: int) -> None:
    """Fork into the new process namespace, whose end is the end of all that was started there."""
    first = os.fork()
    if first:
        os.close(verdict)
        os.waitpid(first, 0)
        return
    try:
        call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.setitimer(signal.ITIMER_REAL, job["wall_seconds"])
        own_root(job, user)
        program = os.fork()
        if not program:
            confined(job, user, status, verdict)
        while os.wait()[0] != program:
            pass
    except Exception as error:
        os.write(status, f"{type(error).__name__}: {error}"[:300].encode())
    os._exit(0)


def own_root(job: dict[str, Any], user: int | None) -> None:
    """An empty file system in memory, with the Python library read-only, as the root."""
    root = job["folder"]
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    size = f"size={job['files_mib']}m,nr_inodes=10000,mode=755"
    mount("tmpfs", root, kind="tmpfs", flags=MS_NOSUID | MS_NODEV, data="size=1m,mode=755")
    shown: list[str] = []
    for path in (*SYSTEM, job["prefix"], *sorted(job["paths"])):
        if os.path.islink(path):
            os.symlink(os.readlink(path), root + path)
        elif os.path.isdir(path) and not any(path.startswith(f"{each}/") for each in shown):
            os.makedirs(root + path, exist_ok=True)
            mount(path, root + path, flags=MS_BIND | MS_REC)
            make_read_only(root + path, AT_RECURSIVE)
            shown.append(path)
    os.mkdir(f"{root}/dev")
    for path in DEVICES:
        os.close(os.open(root + path, os.O_CREAT | os.O_WRONLY))
        mount(path, root + path, flags=MS_BIND)
    work = "/" + os.path.basename(root)  # a name that nothing else has
    os.mkdir(root + work)
    mount("tmpfs", root + work, kind="tmpfs", flags=MS_NOSUID | MS_NODEV, data=size)
    make_read_only(root, 0)
    if user is not None:
        os.chown(root + work, user, user)
    os.chroot(root)
    os.chdir(work)


def mount(source: str, target: str, *, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2); an OSError names the target."""
    texts = [os.fsencode(each) if each else None for each in (source, target, kind, data)]
    call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])


def make_read_only(target: str, flags: int) -> None:
    """A mount, and with AT_RECURSIVE all below it, however they were mounted (Linux 5.12)."""
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY, 0, 0, 0)
    path, size = ctypes.c_char_p(os.fsencode(target)), ctypes.sizeof(attributes)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, path, flags, attributes, size)


def run_in_folder(job: dict[str, Any], user: int | None, status: int, verdict: int) -> None:
    """Without namespaces: in a temporary folder, then kill what is left."""
    os.chdir(job["folder"])
    if user is not None:
        os.chown(job["folder"], user, user)
    program = os.fork()
    if not program:
        os.setsid()
        confined(job, user, status, verdict)
    os.close(verdict)
    signal.signal(signal.SIGALRM, lambda _number, _frame: kill_all(user, program))
    signal.setitimer(signal.ITIMER_REAL, job["wall_seconds"])
    os.waitpid(program, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        kill_all(user, program)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


def kill_all(user: int | None, program: int) -> None:
    """End every process of the program: all of its user, or else all below this process."""
    if user is not None:
        killer = os.fork()
        if not killer:
            os.setresuid(user, user, user)
            os.kill(-1, signal.SIGKILL)
            os._exit(0)
        os.waitpid(killer, 0)
        return
    for process in (program, *below(os.getpid())):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def below(process: int) -> Iterator[int]:
    """The processes that a process has started, and that these have."""
    try:
        with open(f"/proc/{process}/task/{process}/children") as file:
            children = [int(each) for each in file.read().split()]
    except OSError:
        return
    for child in children:
        yield child
        yield from below(child)


def confined(job: dict[str, Any], user: int | None, status: int, verdict: int) -> NoReturn:
    """Give up all rights, take the limits, and run program and tests."""
    try:
        sys.path[:] = job["paths"]
        os.environ["HOME"] = os.environ["TMPDIR"] = os.getcwd()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        null = os.open("/dev/null", os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        give_up_rights(user)
        call("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for path in job["paths"]:  # nothing would say later why an import failed
            os.scandir(path).close()
        mib = 2**20
        for kind, most in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_CPU, job["cpu_seconds"]),
            (resource.RLIMIT_FSIZE, job["files_mib"] * mib),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_NPROC, job["processes"]),
            (resource.RLIMIT_AS, job["memory_mib"] * mib),
        ):
            resource.setrlimit(kind, (most, most))
        if job["isolation"] == "limits":
            refuse_calls()
        os.write(status, b"ready")
    except Exception as error:
        os.write(status, f"{type(error).__name__}: {error}"[:300].encode())
        os._exit(1)
    os.dup2(verdict, 3)
    os.closerange(4, max(status, verdict, null) + 1)
    if holds(job):
        os.write(3, job["marker"].encode())
    os._exit(0)


def give_up_rights(user: int | None) -> None:
    """Become a user who owns nothing, or one without any capability; for good."""
    call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        return
    for capability in range(64):
        libc.prctl(DROP_FROM_BOUND, capability, 0, 0, 0)
    header, nothing = (ctypes.c_uint32 * 2)(CAPABILITIES_V3, 0), (ctypes.c_uint32 * 6)()
    call("capset", header, nothing)


def refuse_calls() -> None:
    """No socket from now on, and no signal or other access to any process; for good."""
    machine = os.uname().machine
    if machine not in REFUSED:
        raise OSError(
            f"isolation limits knows the machines {', '.join(REFUSED)}; this is {machine}"
        )
    number, calls, limits = REFUSED[machine]
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, number), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    program += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, REFUSE)]
    for each in calls:
        program += [(EQUAL, 0, 1, each), (RETURN, 0, 0, REFUSE)]
    # limits of this process (0) may be read and lowered, those of others may not
    program += [(EQUAL, 0, 3, limits), (LOAD, 0, 0, 16), (EQUAL, 1, 0, 0), (RETURN, 0, 0, REFUSE)]
    program += [(RETURN, 0, 0, ALLOW)]
    code = b"".join(struct.pack("HBBI", *each) for each in program)
    memory = ctypes.create_string_buffer(code, len(code))
    whole = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(memory)))
    call("prctl", SECCOMP, FILTER, whole, 0, 0)


def holds(job: dict[str, Any]) -> bool:
    """Whether the tests run to their end after the program."""
    names: Any = vars(builtins)
    known = dict(names)
    space: dict[str, Any] = {"__name__": "program", "__builtins__": builtins}
    tests = Equalities().visit(ast.parse(job["tests"]))
    code = compile(ast.fix_missing_locations(tests), "tests", "exec")
    try:
        exec(compile(job["code"], "program", "exec"), space)
        names.clear()
        names.update(known)
        seen = {name: value for name, value in space.items() if name not in known}
        seen |= {"__builtins__": builtins, "__name__": "tests", SAME: is_same}
        exec(code, seen)
        if job["check"] is not None:
            seen[job["check"]](space[job["candidate"]])
    except BaseException:
        return False
    return True


HEAP_TYPE = 1 << 9  # of a class that was made while the program ran
SAME = "__is_same__"


class Equalities(ast.NodeTransformer):
    """`a == b` of tests as a call of `is_same`, which objects of the program cannot answer for."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """One comparison; chains stay as they are."""
        self.generic_visit(node)
        if len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq):
            called = ast.Name(SAME, ast.Load())
            return ast.Call(called, [node.left, node.comparators[0]], [])
        return node


def is_same(left: Any, right: Any) -> bool:
    """`left == right`, but False where a class of the program would decide on another type."""
    for one, other in ((left, right), (right, left)):
        if type(one) is not type(other) and decides_itself(one):
            return False
    if type(left) is type(right) and type(left) in (list, tuple) and len(left) == len(right):
        return all(map(is_same, left, right))
    if type(left) is type(right) is dict and len(left) == len(right):
        if any(decides_itself(key) for key in (*left, *right)):
            return False
        return all(key in right and is_same(value, right[key]) for key, value in left.items())
    if type(left) is type(right) and type(left) in (set, frozenset):
        return not any(map(decides_itself, (*left, *right))) and left == right
    return bool(left == right)


def decides_itself(value: Any) -> bool:
    """Whether a class that is neither built in nor of a module says what the value is equal to."""
    owner = next(each for each in type(value).__mro__ if "__eq__" in vars(each))
    module = sys.modules.get(owner.__module__)
    return bool(owner.__flags__ & HEAP_TYPE) and getattr(module, owner.__name__, None) is not owner


if __name__ == "__main__":
    main()
