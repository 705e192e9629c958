#!/usr/bin/env bash
# Installs what only the tests of deploy/ need, asking nothing: Slurm for one machine, and Python tools in .local/deploy-venv.
#
# What cannot be had is said and left out: the tests that need it are then counted as skipped. With CI=true the Python tools must
# be there, since they come from PyPI and need no rights.
set -uo pipefail
cd "$(dirname "$0")/.."
venv=.local/deploy-venv

packages=()
[ -x /usr/sbin/slurmctld ] || packages+=(slurmctld)
[ -x /usr/sbin/slurmd ] || packages+=(slurmd)
command -v sbatch >/dev/null || packages+=(slurm-client)
[ -x /usr/sbin/munged ] || packages+=(munge)
if [ "${#packages[@]}" -gt 0 ]; then
  as_root=()
  [ "$(id -u)" -eq 0 ] || as_root=(sudo -n)
  echo "installing ${packages[*]}"
  if ! { "${as_root[@]}" apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >/dev/null; then
    echo "notice: ${packages[*]} cannot be installed here; the tests on Slurm will be skipped" >&2
  fi
fi

if ! "$venv/bin/python" -c 'import kubernetes_validate, yaml' 2>/dev/null; then
  echo "making $venv"
  # Debian's python3 may lack ensurepip: virtualenv then comes from pip itself.
  if ! { python3 -m venv --clear "$venv" && "$venv/bin/pip" install -q --disable-pip-version-check -r deploy/tests/requirements.txt; }; then
    rm -rf "$venv"
    echo "notice: kubernetes-validate cannot be installed from PyPI; the manifests will not be validated" >&2
    [ "${CI:-}" != true ] || exit 1
  fi
fi
