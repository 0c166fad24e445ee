"""The program that `sandbox.py` starts: it isolates itself, and then becomes the untrusted program.

    python -I -S sandbox_launcher.py ORDER      # a dictionary, marshalled, in hexadecimal digits

There are three processes. The launcher enters new namespaces and can be killed from outside. Its child is the first
process of the new process namespace: it ends with the launcher, and when it ends, the kernel ends everything in the
namespace. That child's child drops all rights and executes the program. Errors before that go to the status pipe, which
the program never has.

It runs for every test of a program: it imports neither json nor signal nor typing, which would take as long as Python
itself takes to start.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

# user, network, process, mount, IPC, host name
_NEW_NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x00020000 | 0x08000000 | 0x04000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_SYS_MOUNT_SETATTR, _AT_RECURSIVE, _READ_ONLY_NOSUID_NODEV = 442, 0x8000, 1 | 2 | 4
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_SIGKILL, _SIG_DFL = 9, None
_NOBODY = 65534
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

libc = ctypes.CDLL(None, use_errno=True)


def main() -> NoReturn:
    """Run the program that argv describes, and exit with its code."""
    order: dict[str, Any] = marshal.loads(bytes.fromhex(sys.argv[1]))
    status = order["status"]
    os.set_inheritable(status, False)
    try:
        libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL)
        if os.getppid() != order["parent"]:
            os._exit(1)
        with open(order["program"], encoding="utf-8", errors="surrogatepass") as file:
            source = file.read()
        if order["isolated"]:
            _enter_namespaces()
        watch, alive = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(alive)
            _first_process(order, source, watch)
        os.close(status)
        os._exit(_exit_code(child))
    except BaseException as error:
        _fail(status, error)


def _first_process(order: dict[str, Any], source: str, watch: int) -> NoReturn:
    """Guard the program: nothing in the namespace outlives this process, and it does not outlive the launcher."""
    status = order["status"]
    try:
        libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL)
        libc.prctl(_PR_SET_DUMPABLE, 0)  # otherwise the program, which has the same owner, could trace it
        os.set_blocking(watch, False)
        try:
            if os.read(watch, 1) == b"":
                os._exit(1)  # the launcher died before the call of prctl
        except BlockingIOError:
            pass
        child = os.fork()
        if child == 0:
            _become_program(order, source)
        os.close(status)
        for descriptor in (0, 1, 2):
            os.close(descriptor)  # the reader outside sees the end of the output when the program has ended
        os._exit(_exit_code(child))
    except BaseException as error:
        _fail(status, error)


def _become_program(order: dict[str, Any], source: str) -> NoReturn:
    try:
        if order["isolated"]:
            _enter_root(order)
            directory = "/tmp"
        else:
            directory = order["directory"]
        os.chdir(directory)
        path = os.path.join(directory, "program.py")
        with open(path, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(source)
        if os.getuid() == 0 and order["isolated"]:
            os.chown(directory, _NOBODY, _NOBODY)
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        for name, limit in order["limits"].items():
            number = getattr(resource, name)
            hard = resource.getrlimit(number)[1]
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(number, (limit, limit))
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        for number in order["signals"]:
            libc.signal(number, _SIG_DFL)
        os.write(order["status"], b"ready")
        environment = {"PATH": "/usr/bin:/bin", "HOME": directory, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        # Every descriptor above 2 closes with the exec: Python's own are set so, and inherited ones are closed here.
        os.closerange(3, order["status"])
        os.closerange(order["status"] + 1, 4096)
        os.execve(order["python"], [order["python"], "-I", "-S", "-B", path], environment)
    except BaseException as error:
        _fail(order["status"], error)


def _enter_namespaces() -> None:
    """Enter new namespaces of every kind; raises OSError where the kernel does not allow it."""
    target, ready, done = os.getpid(), os.pipe(), os.pipe()
    helper = os.fork()
    if helper == 0:
        # root needs a second user, because root has no limit on processes, and only a process outside may map it
        try:
            os.close(ready[1])
            os.read(ready[0], 1)
            root = os.geteuid() == 0
            users, groups = os.geteuid(), os.getegid()
            with open(f"/proc/{target}/setgroups", "w", encoding="ascii") as file:
                file.write("allow" if root else "deny")
            for kind, own in (("uid", users), ("gid", groups)):
                with open(f"/proc/{target}/{kind}_map", "w", encoding="ascii") as file:
                    file.write(f"0 0 1\n{_NOBODY} {_NOBODY} 1\n" if root else f"{_NOBODY} {own} 1\n")
            os.write(done[1], b"1")
        finally:
            os._exit(0)
    os.close(done[1])
    _check(libc.unshare(_NEW_NAMESPACES), "unshare")
    os.write(ready[1], b"1")
    mapped = os.read(done[0], 1)
    os.waitpid(helper, 0)
    if not mapped:
        raise OSError("the user namespace cannot be mapped")


def _enter_root(order: dict[str, Any]) -> None:
    """Make a root directory in memory with Python and the system's libraries, read-only, and an empty /tmp."""
    root = order["directory"]
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("none", root, "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={order['tmpfs_bytes']},mode=755")
    for path in dict.fromkeys([*_SYSTEM, *order["readable"]]):
        if os.path.exists(path):
            _bind(path, root)
    for path in _DEVICES:
        _bind(path, root, read_only=False)
    os.makedirs(f"{root}/tmp", exist_ok=True)
    os.mkdir(f"{root}/.old")
    machine = os.uname().machine
    if machine not in _SYS_PIVOT_ROOT:
        raise OSError(f"no isolation is known for {machine}")
    call = ctypes.c_long(_SYS_PIVOT_ROOT[machine])
    _check(libc.syscall(call, root.encode(), f"{root}/.old".encode()), "pivot_root")
    os.chdir("/")
    _check(libc.umount2(b"/.old", _MNT_DETACH), "umount")
    os.rmdir("/.old")


def _bind(path: str, root: str, read_only: bool = True) -> None:
    target = root + path
    if os.path.islink(path):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(path), target)
        return
    if os.path.exists(target):
        return  # it is in a directory that is there already
    if os.path.isdir(path):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "wb").close()
    _mount(path, target, None, _MS_BIND | _MS_REC)
    if read_only:
        attributes = (ctypes.c_uint64 * 4)(_READ_ONLY_NOSUID_NODEV, 0, 0, 0)
        call = ctypes.c_long(_SYS_MOUNT_SETATTR)
        done = libc.syscall(call, -100, target.encode(), _AT_RECURSIVE, attributes, ctypes.c_size_t(32))
        _check(done, "mount_setattr")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    texts = [text.encode() if text else None for text in (source, target, kind, options)]
    done = libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3])
    _check(done, f"mounting {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _exit_code(child: int) -> int:
    """Wait for a child, and for others that end before it, and return its exit code in the shell's form."""
    while True:
        ended, state = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(state)
            return code if code >= 0 else 128 - code


def _fail(status: int, error: BaseException) -> NoReturn:
    os.write(status, f"error: {type(error).__name__}: {error}".encode())
    os._exit(1)


if __name__ == "__main__":
    main()
