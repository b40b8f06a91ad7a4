#!/bin/sh
# Fetches a released OLMoE from the Hugging Face hub: config, tokenizer and weights. Needs curl and sha256sum.
#
#   scripts/download.sh [DIR [REPOSITORY]]      default: OLMoE-1B-7B-0924 allenai/OLMoE-1B-7B-0924, 13.8 GB
#
# After an interruption, call it again: it goes on where it was. When all is there, it checks the files. For a large
# file the repository holds a "pointer" with its size and SHA-256; the file gets its name when both are right.
# REVISION is a branch or commit (default: main); HF_ENDPOINT is a server other than https://huggingface.co.
set -eu

dir=${1:-OLMoE-1B-7B-0924}
repository=${2:-allenai/OLMoE-1B-7B-0924}
hub=${HF_ENDPOINT:-https://huggingface.co}/$repository
revision=${REVISION:-main}
https="--proto =https --proto-redir =https"
[ -z "${HF_ENDPOINT:-}" ] || https=

die() { echo "download.sh: $*" >&2; exit 1; }
for tool in curl sha256sum; do command -v $tool >/dev/null || die "$tool is missing; install it first"; done
mkdir -p "$dir" || die "cannot make the directory $dir"
pointers=$(mktemp -d)
trap 'rm -rf "$pointers"' EXIT
trap 'exit 130' INT TERM

# get URL FILE [OPTIONS]
get() {
    url=$1; output=$2; shift 2
    # shellcheck disable=SC2086
    curl --fail --location $https --connect-timeout 30 --speed-time 60 --speed-limit 1000 --output "$output" "$@" "$url"
}
size() { if [ -f "$1" ]; then wc -c < "$1" | tr -d ' '; else echo 0; fi; }
megabytes() { echo "$(($1 / 1000000)) MB"; }

# A file as the repository has it: a small one itself, of a large one the pointer, three lines
raw() { get "$hub/raw/$revision/$1" "$pointers/$1" --silent --show-error --retry 5; }
is_pointer() { head -c 40 "$pointers/$1" | grep -q '^version https://git-lfs'; }
field() { sed -n "s/^$2 \(sha256:\)\{0,1\}//p" "$pointers/$1"; }

files="config.json tokenizer.json"
for file in $files; do raw "$file" || die "cannot fetch $file of $repository: is the name right, and is there a network?"; done
for file in generation_config.json tokenizer_config.json special_tokens_map.json model.safetensors.index.json; do
    if raw $file 2>/dev/null; then files="$files $file"; fi
done
weights=model.safetensors
if [ -f "$pointers/model.safetensors.index.json" ]; then
    weights=$(grep -o '"[^"/]*\.safetensors"' "$pointers/model.safetensors.index.json" | tr -d '"' | sort -u)
fi
for file in $weights; do
    raw "$file" || die "cannot fetch the pointer of $file of $repository"
    is_pointer "$file" || die "$hub/raw/$revision/$file is no pointer with a SHA-256 and a size"
done
files="$files $weights"

missing=0
for file in $files; do
    if is_pointer "$file" && [ "$(size "$dir/$file")" != "$(field "$file" size)" ]; then
        missing=$((missing + $(field "$file" size) - $(size "$dir/$file.part")))
    fi
done
free=$(df -Pk "$dir" | awk 'NR == 2 { print $4 }')
[ $((missing / 1024)) -lt "$free" ] || die "$dir: $(megabytes $missing) are missing, $(megabytes $((free * 1024))) are free; make room, or name another directory"

for file in $files; do
    to=$dir/$file
    if ! is_pointer "$file"; then
        mv "$pointers/$file" "$to"
        echo "$file: $(size "$to") bytes"
        continue
    fi
    bytes=$(field "$file" size)
    sha256=$(field "$file" oid)
    if [ "$(size "$to")" = "$bytes" ]; then mv "$to" "$to.part"; fi
    if [ "$(size "$to.part")" -gt "$bytes" ]; then rm "$to.part"; fi
    here=-1
    # an interrupted transfer is continued, as long as each one adds to the file
    while [ "$(size "$to.part")" -lt "$bytes" ]; do
        [ "$(size "$to.part")" -gt "$here" ] || die "$file: interrupted at $(megabytes "$here") of $(megabytes "$bytes"); call this again to go on"
        here=$(size "$to.part")
        echo "$file: $(megabytes "$here") of $(megabytes "$bytes") are here, fetching the rest"
        if [ -t 2 ]; then progress=--progress-bar; else progress="--silent --show-error"; fi
        # shellcheck disable=SC2086
        get "$hub/resolve/$revision/$file" "$to.part" --continue-at - $progress || true
    done
    if [ "$(sha256sum < "$to.part" | cut -d ' ' -f 1)" != "$sha256" ]; then
        rm "$to.part"
        die "$file: damaged, its SHA-256 is not $sha256; it was removed, call this again to fetch it"
    fi
    mv "$to.part" "$to"
    echo "$file: $bytes bytes, SHA-256 $sha256"
done
echo "$dir is complete. Next: ./olmoe verify --model $dir --reference tests/fixtures/olmoe-1b-7b-0924.safetensors"
