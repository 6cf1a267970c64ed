"""Run a Dockerfile's steps in a plain Debian, without a container engine.

python scripts/replay_dockerfile.py --root debian [--mirror URL] [--bind FROM:TO] [--env NAME=VALUE]
    [--then "python sota_configs/world2filter.py experiment=smoke"]

Needs root. ``FROM`` is replaced by a Debian made by debootstrap in the folder (reused if it
exists); ARG, ENV, USER, WORKDIR, COPY of tracked files and RUN are executed in a chroot. It does
not cover the real base image, an NVIDIA driver, or layers and their cache.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions in order, with continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    parts = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(name.upper(), argument.strip()) for name, argument in parts]


def context_files() -> list[Path]:
    """Return the files of ``COPY . .``: tracked files that .dockerignore does not exclude."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        Path(name)
        for name in listed
        if not any(fnmatch(name, rule) or name.startswith(f"{rule}/") for rule in ignored)
    ]


class Replay:
    """The state that instructions change: variables, user, folder."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root = root
        self.variables = dict(environment)
        self.user, self.folder = "0", "/"

    def expand(self, text: str) -> str:
        """Substitute variables."""
        return re.sub(r"\$\{?(\w+)\}?", lambda m: self.variables.get(m[1], ""), text)

    def run(self, command: str) -> None:
        """Run a shell command in the chroot, as the user, in the folder."""
        who = f"{self.user}:{self.user}"
        home = "/root" if self.user == "0" else "/home/w2f"
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        variables = {"HOME": home, "PATH": path} | self.variables
        inside = f"cd {shlex.quote(self.folder)} && {command}"
        subprocess.run(
            ["chroot", f"--userspec={who}", str(self.root), "/bin/sh", "-c", inside],
            env=variables,
            check=True,
        )

    def copy(self, argument: str) -> None:
        """Copy tracked files; every source is a folder, and keeps its contents' names."""
        *sources, target = [word for word in argument.split() if not word.startswith("--")]
        destination = self.root / self.folder.lstrip("/") / target
        for file in context_files():
            for source in sources:
                inside = Path(os.path.relpath(file, source))
                if not inside.as_posix().startswith(".."):
                    place = destination / inside
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(ROOT / file, place)
        subprocess.run(["chown", "-R", f"{self.user}:{self.user}", destination], check=True)

    def do(self, name: str, argument: str) -> None:
        """Execute one instruction."""
        if name == "ARG":
            key, _, value = argument.partition("=")
            self.variables.setdefault(key, value)
        elif name == "ENV":
            pairs = [pair.partition("=") for pair in shlex.split(self.expand_env(argument))]
            self.variables |= {key: value for key, _, value in pairs}
        elif name == "USER":
            self.user = self.expand(argument)
        elif name == "WORKDIR":
            self.folder = argument
        elif name == "COPY":
            self.copy(argument)
        elif name == "RUN":
            self.run(argument)

    def expand_env(self, argument: str) -> str:
        """Expand ENV's values; PATH starts with that of the base image."""
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return argument.replace("$PATH", self.variables.get("PATH", path))


@contextmanager
def mounted(root: Path, binds: list[str]) -> Iterator[None]:
    """Mount the folders that a chroot needs and the requested ones; always unmount them.

    Requested folders are read-only: a package installed in the chroot must not write to them.
    """
    places: list[Path] = []
    needed = ["/proc:/proc", "/dev:/dev"]
    try:
        for bind in [*needed, *binds]:
            source, _, target = bind.partition(":")
            place = root / target.lstrip("/")
            if Path(source).is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
            subprocess.run(["mount", "--rbind", source, place], check=True)
            places.append(place)
            # Otherwise unmounting would propagate to this machine's /dev.
            subprocess.run(["mount", "--make-rprivate", place], check=True)
            if bind not in needed:
                subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
        yield
    finally:
        for place in reversed(places):
            subprocess.run(["umount", "--lazy", place], check=True)


def main() -> None:
    """Read the command line, then replay."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--suite", default="bookworm")
    parser.add_argument("--mirror", help="Debian mirror (default: debootstrap's)")
    parser.add_argument("--bind", action="append", default=[], metavar="FROM:TO", help="read-only")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--then", action="append", default=[], help="run at the end, as the user")
    args = parser.parse_args()
    if not (args.root / "etc" / "debian_version").exists():
        mirror = [args.mirror] if args.mirror else []
        command = ["debootstrap", "--variant=minbase", args.suite, str(args.root), *mirror]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    replay = Replay(args.root, dict(pair.split("=", 1) for pair in args.env))
    steps = [*instructions(ROOT / "Dockerfile"), *(("RUN", command) for command in args.then)]
    with mounted(args.root, args.bind):
        for name, argument in steps:
            start = time.monotonic()
            replay.do(name, argument)
            shown = argument if len(argument) < 90 else f"{argument[:87]}..."
            print(f"{time.monotonic() - start:7.1f} s  {name} {shown}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
