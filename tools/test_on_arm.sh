#!/usr/bin/env bash
# Run tests with an arm64 Python under emulation (qemu-user), on a machine of another architecture.
#
# Usage: tools/test_on_arm.sh FOLDER [arguments of pytest]
#
# Needs Debian or a relative (apt-get, dpkg-deb), Python with pip, and about 1 GB. Packages are
# downloaded and unpacked into FOLDER, nothing is installed and no root is needed; a second run uses
# what is there. Python's machine code is made for a Neoverse N1: NEON with the dot product.
# The compiler is emulated, too: count with minutes for the kernels of one test file.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
[ $# -ge 1 ] || { sed -n 's/^# \{0,1\}//; 2,10p' "$0" >&2; exit 2; }
mkdir -p "$1"
root=$(cd "$1" && pwd)
shift

unpack() { for file in "$1"/*.deb; do dpkg-deb --extract "$file" "$2"; done; }

# --- the emulator, of this machine's architecture

if [ ! -d "$root/emulator" ]; then
  mkdir -p "$root/packages"
  (cd "$root/packages" && apt-get download --quiet=2 -o APT::Sandbox::User=root qemu-user-static)
  unpack "$root/packages" "$root/emulator.new"
  mv "$root/emulator.new" "$root/emulator"
fi

# --- Python and the libraries that it needs, of arm64: by an apt that knows nothing of this machine

if [ ! -d "$root/system" ]; then
  mkdir -p "$root/apt/state/lists/partial" "$root/apt/cache/archives/partial"
  : >"$root/apt/status"
  options=(--quiet=2 -o APT::Architecture=arm64 -o APT::Architectures::=arm64
    -o Dir::State="$root/apt/state" -o Dir::State::status="$root/apt/status"
    -o Dir::Cache="$root/apt/cache" -o Debug::NoLocking=1 -o APT::Sandbox::User=root)
  apt-get "${options[@]}" update
  apt-get "${options[@]}" --yes --download-only --no-install-recommends \
    install python3 libgomp1 libstdc++6
  unpack "$root/apt/cache/archives" "$root/system.new"
  mv "$root/system.new" "$root/system"
fi
interpreter=$(echo "$root"/system/usr/bin/python3.[0-9]*)
version=${interpreter##*/python}

# --- the packages of the tests, as wheels for arm64

if [ ! -d "$root/site" ]; then
  mapfile -t wanted < <(python3 - "$here/pyproject.toml" <<'END'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
tests = project["optional-dependencies"]["test"]
print("\n".join(project["dependencies"] + [t for t in tests if not t.startswith("localv4")]))
END
  )
  platforms=()
  for glibc in 17 24 26 27 28 31 34 35; do platforms+=(--platform "manylinux_2_${glibc}_aarch64"); done
  python3 -m pip install --quiet --no-warn-conflicts --target "$root/site.new" --only-binary=:all: \
    --platform manylinux2014_aarch64 "${platforms[@]}" \
    --implementation cp --python-version "$version" "${wanted[@]}"
  mv "$root/site.new" "$root/site"
fi

# --- a Python that starts itself a second time, as tests and the compiler do

cat >"$root/python" <<END
#!/bin/sh
exec env PYTHONHOME="$root/system/usr" "$root/emulator/usr/bin/qemu-aarch64-static" \
  -L "$root/system" -0 "$root/python" "$interpreter" "\$@"
END
chmod 755 "$root/python"

# LLVM asks the system which processor it has, and would be told of this machine's.
export NUMBA_CPU_NAME=neoverse-n1
export NUMBA_CPU_FEATURES=+neon,+fp-armv8,+fullfp16,+dotprod,+lse,+crc,+rdm,+rcpc
export PYTHONPATH=$here:$root/site XDG_CACHE_HOME=$root/cache
cd "$here"
exec "$root/python" -m pytest -p no:cacheprovider "$@"
