#!/bin/sh
# Set-up for the Makefile:
#   setup.sh packages   .venv with the locked packages and this package
#   setup.sh extras     add the locked packages of all extras
#   setup.sh bytecode   compile the packages again, as after installing more of them
#   setup.sh gl         the libraries that MuJoCo renders with
# PYTHON=/path/to/python3.12 chooses the interpreter of a new .venv. CPU=1 gives a new .venv PyTorch's CPU
# build, which has no CUDA libraries; the environment remembers it.
set -eu
cd "$(dirname "$0")/.."

venv_python=.venv/bin/python
cpu_mark=.venv/.cpu

fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

# Install Debian packages if root, otherwise print the command and stop. First argument: what is missing.
need_packages() {
  missing=$1
  shift
  if [ "$(id -u)" -ne 0 ]; then
    fail "$missing. Run this, then make again:

  sudo apt-get update && sudo apt-get install -y $*
"
  fi
  command -v apt-get >/dev/null || fail "$missing, and there is no apt-get to install: $*"
  printf 'setup: %s; installing %s\n' "$missing" "$*" >&2
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -q && apt-get install -y -q --no-install-recommends "$@" ||
    fail "$missing, and apt-get could not install: $*"
}

# A name on the PATH is not enough: version managers leave shims that only print an error, and Ubuntu
# 22.04's python3.11 is a release candidate that breaks torch.
is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11, 0, "final"))' 2>/dev/null
}

find_python() {
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if is_new_enough "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  return 1
}

has_uv() {
  uv --version >/dev/null 2>&1
}

create_venv() {
  if [ -z "${PYTHON:-}" ] && ! command -v python3 >/dev/null; then
    need_packages "there is no python3" python3 python3-venv
  fi
  if ! python=$(find_python); then
    [ -z "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not a released Python 3.11 or newer"
    has_uv || fail "no released Python 3.11 or newer on the PATH. Debian 12 and Ubuntu 24.04 have
one: sudo apt-get install python3 python3-venv. On older systems install uv, which brings its own
Python, or name an interpreter: make PYTHON=/path/to/python3.12"
    uv venv --clear --python 3.12 .venv
    return
  fi
  # Debian packages ensurepip separately; without it venv leaves a directory that only looks complete.
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    version=$("$python" -c 'import sys; print("{}.{}".format(*sys.version_info))')
    need_packages "$python can't make virtual environments" "python$version-venv"
  fi
  printf 'setup: making .venv with %s\n' "$("$python" --version)" >&2
  "$python" -m venv --clear .venv
}

find_uv() {
  if has_uv; then
    uv=uv
  else
    $venv_python -m pip install --quiet --disable-pip-version-check uv
    uv="$venv_python -m uv"
  fi
}

# The lock is the whole tested set, so nothing is resolved here: --no-deps. It was made for the CUDA
# build: the CPU build has the same version, at PyTorch's own index, and needs none of these packages.
install_locked() {
  if [ -e $cpu_mark ]; then
    grep -Ev '^(cuda-|nvidia-|triton==)' "$1" >.venv/locked-cpu.txt
    $uv pip install --python $venv_python --no-deps --torch-backend cpu -r .venv/locked-cpu.txt
  else
    $uv pip install --python $venv_python --no-deps -r "$1"
  fi
}

packages() {
  if [ ! -e $venv_python ]; then
    create_venv
    [ -z "${CPU:-}" ] || touch $cpu_mark
  fi
  is_new_enough $venv_python || fail ".venv has no working Python 3.11 or newer: remove .venv"
  [ -z "${CPU:-}" ] || [ -e $cpu_mark ] || fail "CPU=$CPU, but .venv has the CUDA build: remove .venv"
  find_uv
  install_locked requirements/locked.txt
  $uv pip install --python $venv_python --no-deps --no-build-isolation --editable .
  bytecode
}

extras() {
  find_uv
  install_locked requirements/locked-extras.txt
  bytecode
}

# With PYTHONDONTWRITEBYTECODE set, as in many containers, every process would otherwise compile all that
# it imports, and keep nothing. Up-to-date files are skipped; a few packages have files that are not Python.
bytecode() {
  printf 'setup: compiling bytecode\n' >&2
  site=$($venv_python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  $venv_python -W ignore -m compileall -qq -j 0 "$site" w2f_torchrl sota_configs || true
}

# Only creating a context checks the library, its driver and their versions.
can_render() {
  $venv_python -c 'import mujoco; mujoco.GLContext(16, 16).make_current()' >/dev/null 2>&1
}

gl() {
  export MUJOCO_GL="${MUJOCO_GL:-egl}"
  can_render && return
  case $MUJOCO_GL in
    egl) need_packages "MuJoCo can't render with EGL" libegl1 libgl1 libgles2 libegl-mesa0 ;;
    osmesa) need_packages "MuJoCo can't render with OSMesa" libosmesa6 libgl1 ;;
    *) fail "MuJoCo can't render with MUJOCO_GL=$MUJOCO_GL; headless machines take egl or osmesa" ;;
  esac
  can_render || fail "MuJoCo still can't render with MUJOCO_GL=$MUJOCO_GL. To see why:

  MUJOCO_GL=$MUJOCO_GL $venv_python -c 'import mujoco; mujoco.GLContext(16, 16).make_current()'
"
}

case ${1:-} in
  packages | extras | bytecode | gl) "$1" ;;
  *) fail "usage: scripts/setup.sh packages|extras|bytecode|gl" ;;
esac
