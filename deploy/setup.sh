#!/usr/bin/env bash
# Installs what the build and the runs need on Debian and Ubuntu, asking nothing: Open MPI, and libclang for its bindings.
# Does nothing where everything is there already.
set -euo pipefail

packages=()
command -v mpicc >/dev/null || packages+=(libopenmpi-dev)
command -v mpirun >/dev/null || packages+=(openmpi-bin)
command -v clang >/dev/null || packages+=(clang)
command -v cc >/dev/null || packages+=(gcc libc6-dev)
compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null || packages+=(libclang-dev)

if ! command -v cargo >/dev/null; then
  echo "error: cargo is missing: install Rust from https://rustup.rs, then run this again" >&2
  exit 1
fi
[ "${#packages[@]}" -eq 0 ] && exit 0

if ! command -v apt-get >/dev/null; then
  echo "error: ${packages[*]} are missing, and this is no Debian or Ubuntu: install Open MPI and libclang by hand" >&2
  exit 1
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! sudo -n true 2>/dev/null; then
    echo "error: ${packages[*]} are missing; run: sudo apt-get install --no-install-recommends ${packages[*]}" >&2
    exit 1
  fi
  as_root=(sudo -n)
fi
echo "installing ${packages[*]}"
"${as_root[@]}" apt-get update -qq
DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
