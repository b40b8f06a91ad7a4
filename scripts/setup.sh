#!/bin/sh
# Installs what building, training and testing need, on a CPU and with CUDA: by apt-get, with sudo when not root. Where
# there is dnf or pacman instead, it prints the command that installs what is missing, and stops; elsewhere the list.
# `setup.sh page` instead installs the browser in which `make test-page` tests the page of `olmoe routing`.
# Installs nothing when nothing is missing. Where nvcc is, or DEVICE=cuda is given, it also reports on what it never
# installs: NVIDIA's driver, the CUDA toolkit and NCCL.
set -eu

apt="g++ perl-base libdnnl-dev nlohmann-json3-dev libutf8proc-dev zlib1g-dev libopenmpi-dev openmpi-bin \
python3 python3-pytest python3-matplotlib python3-venv xz-utils libzstd-dev"
dnf="gcc-c++ make perl-interpreter onednn-devel json-devel utf8proc-devel zlib-devel openmpi-devel \
python3 python3-pytest python3-matplotlib xz libzstd-devel"
pacman="gcc make perl onednn nlohmann-json libutf8proc zlib openmpi python python-pytest python-matplotlib xz zstd"
if [ "${1:-}" = page ]; then                    # the fonts are those of the README's picture
    apt="chromium chromium-driver fonts-inter fonts-jetbrains-mono"
    dnf="chromium chromedriver"
    pacman="chromium"
    DEVICE=cpu
fi

has() { command -v "$1" >/dev/null 2>&1; }

# The first of some folders that has the file, or nothing
folder_with() {
    file=$1
    shift
    for folder; do
        if [ -n "$folder" ] && [ -e "$folder/$file" ]; then echo "$folder"; return; fi
    done
}

# What a CUDA build needs beside the packages. Fails where DEVICE=cuda was asked for and could not be built.
cuda_report() {
    nvcc=${NVCC:-}
    if [ -z "$nvcc" ] && has nvcc; then nvcc=nvcc; fi
    if [ -z "$nvcc" ] && [ -x /usr/local/cuda/bin/nvcc ]; then nvcc=/usr/local/cuda/bin/nvcc; fi
    if [ -n "$nvcc" ] && ! has "$nvcc"; then nvcc=""; fi
    if [ "${DEVICE:-}" = cpu ] || { [ -z "$nvcc" ] && [ "${DEVICE:-}" != cuda ]; }; then return 0; fi
    complete=true
    echo "setup: for CUDA (nothing of this is installed here; packages: developer.nvidia.com/cuda-downloads):"
    if has nvidia-smi && nvidia-smi -L >/dev/null 2>&1; then
        echo "    driver: nvidia-smi finds a GPU"
    else
        echo "    driver: MISSING, or no GPU: nvidia-smi finds none"
        echo "        (to build for another machine, name its GPU: make DEVICE=cuda SM=90)"
    fi
    if [ -z "$nvcc" ]; then
        echo "    toolkit: MISSING: no nvcc. Debian, Fedora: cuda-toolkit of NVIDIA's repository; Arch: cuda"
        complete=false
    else
        home=$(dirname "$(dirname "$(readlink -f "$(command -v "$nvcc")")")")
        lacks=""
        for header in cublas_v2.h cuda_bf16.h nvtx3/nvToolsExt.h; do
            if [ -z "$(folder_with "include/$header" "$home" /usr)" ]; then lacks="$lacks $header"; fi
        done
        if [ -n "$lacks" ]; then
            echo "    toolkit: MISSING:$lacks of $home"
            echo "        (Debian: libcublas-dev-*, cuda-cudart-dev-* and cuda-nvtx-* of nvcc's version)"
            complete=false
        else
            echo "    toolkit: $home"
        fi
        nccl=$(folder_with include/nccl.h "${NCCL_HOME:-}" "$home" /usr /usr/local)
        if [ -n "$nccl" ]; then
            echo "    NCCL: $nccl"
        else
            echo "    NCCL: MISSING; only several GPUs need it"
            echo "        (Debian: libnccl-dev, Fedora: libnccl-devel, Arch: nccl; or NCCL_HOME=FOLDER)"
        fi
    fi
    if [ "${DEVICE:-}" = cuda ] && [ $complete = false ]; then
        echo "setup: a CUDA build needs what is missing above" >&2
        return 1
    fi
}

finish() {
    echo "setup: everything is installed"
    cuda_report
    exit
}

if has apt-get && has dpkg-query; then
    missing=""
    for package in $apt; do
        state=$(dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null || true)
        case $state in
            ii*) ;;
            *) missing="$missing $package" ;;
        esac
    done
elif has dnf && has rpm; then
    missing=""
    for package in $dnf; do rpm -q --whatprovides "$package" >/dev/null 2>&1 || missing="$missing $package"; done
    if [ -n "$missing" ]; then
        cuda_report || true
        echo "setup: as root, run: dnf install$missing" >&2
        echo "    (RHEL and its relatives: first dnf install epel-release, and enable crb; mpicc: module load mpi)" >&2
        exit 1
    fi
elif has pacman; then
    # shellcheck disable=SC2086
    missing=$(pacman -T $pacman || true)
    if [ -n "$missing" ]; then
        cuda_report || true
        echo "setup: as root, run: pacman -S --needed $(echo "$missing" | tr '\n' ' ')" >&2
        exit 1
    fi
elif [ "${1:-}" = page ]; then
    echo "setup: no apt-get, dnf or pacman here. Install chromium and its chromedriver" >&2
    exit 1
else
    cuda_report || true
    cat >&2 <<END
setup: no apt-get, dnf or pacman here. Install these with your system's package manager, then run make:
    g++ (12 or newer, C++17, OpenMP), perl, GNU make
    oneDNN 2 or 3 with headers (Debian: libdnnl-dev), for the CPU build
    nlohmann-json, utf8proc and zlib with headers (nlohmann-json3-dev, libutf8proc-dev, zlib1g-dev)
    Open MPI 4 with headers (libopenmpi-dev, openmpi-bin), for more than one rank
    for the tests: Python 3 with pytest, matplotlib and venv; xz
END
    exit 1
fi
if [ -z "$missing" ]; then finish; fi

as_root=""
if [ "$(id -u)" -ne 0 ]; then
    if ! has sudo; then
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
cuda_report
