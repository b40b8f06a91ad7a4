#!/bin/sh
# Installs what building, training and testing on a CPU need: by apt-get, with sudo when not root. On a system without
# apt-get it prints the list and stops. Installs nothing when nothing is missing.
set -eu

packages="g++ perl-base libdnnl-dev nlohmann-json3-dev libutf8proc-dev zlib1g-dev libopenmpi-dev openmpi-bin \
python3 python3-pytest python3-matplotlib python3-venv xz-utils libzstd-dev"

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    cat >&2 <<END
setup: no apt-get here. Install these with your system's package manager, then run make:
    g++ (12 or newer, C++17, OpenMP), perl, GNU make
    oneDNN 2.x with headers (Debian: libdnnl-dev)
    nlohmann-json, utf8proc and zlib with headers (nlohmann-json3-dev, libutf8proc-dev, zlib1g-dev)
    Open MPI 4 with headers (libopenmpi-dev, openmpi-bin), for more than one rank
    for the tests: Python 3 with pytest, matplotlib and venv; xz
END
    exit 1
fi

missing=""
for package in $packages; do
    state=$(dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null || true)
    case $state in
        ii*) ;;
        *) missing="$missing $package" ;;
    esac
done
if [ -z "$missing" ]; then
    echo "setup: everything is installed"
    exit 0
fi

as_root=""
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "setup: not root and no sudo here; as root, run: apt-get install$missing" >&2
        exit 1
    fi
    as_root="sudo"
fi
echo "setup: installing$missing"
export DEBIAN_FRONTEND=noninteractive
# The list of packages may be missing or old; then it is fetched and the installation tried again.
# shellcheck disable=SC2086
$as_root apt-get install -y -q --no-install-recommends $missing || {
    $as_root apt-get update -q
    $as_root apt-get install -y -q --no-install-recommends $missing
}
