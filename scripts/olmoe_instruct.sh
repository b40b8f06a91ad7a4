#!/usr/bin/env bash
# Makes an Instruct model of OLMoE-1B-7B by the released recipe: SFT, and from its result DPO, or KTO.
#
#   scripts/olmoe_instruct.sh --model DIR --sft FILES --dpo FILES --out OUT [--gpus N] [-- options of olmoe train]
#
#   --model DIR             the base model; without --sft, a model after SFT
#   --sft, --dpo FILES      rows, as scripts/rows.py makes them (.jsonl or .jsonl.gz)
#   --kto FILES             KTO in the place of DPO
#   --gpus N                1, 2, 4, 8, 16 or 32 (default: those of this machine)
#   --hosts HOSTFILE        on several machines, by launch_hosts.sh. In a job of Slurm's, launch_slurm.sh is used:
#                           sbatch -N 4 --gpus-per-node 8 --ntasks-per-node 8 --wrap 'scripts/olmoe_instruct.sh ...'
#   --released-schedule     steps, warm-up and decay of the released runs to all digits. It is for their data: without
#                           it, they are shares of the steps that the rows give
#   --dry-run               print the commands, and what time and memory `olmoe info` plans for them; run nothing
#
# Results are OUT/sft/step-*, and OUT/dpo/step-* or OUT/kto/step-*. Ctrl-C and SIGTERM save; the same command goes on.
# Options after -- are given to all runs; where they are above already, they take their place.
#
# Sources: "README" is that of github.com/allenai/OLMoE, Adaptation (commands for 8 GPUs); "log" logs/olmoe-sft-logs.txt
# and olmoe-dpo-logs.txt there (32 GPUs); "code" finetune.py and dpo_tune.py of allenai/open-instruct, August 2024, and
# kto.py of Muennighoff/kto, with trl 0.9.6.
set -euo pipefail

# What every run has. Weight decay 0 (README), AdamW 0.9, 0.999, 1e-8 (torch's defaults) and clipping at 1.0 (log:
# gradient_clipping of DeepSpeed's "auto") are defaults of --objective. KTO's own cuts at 512 and 128 are not made.
common=(--seq 4096                                              # README: --max_seq_length 4096
        --schedule hf-linear                                    # README: --lr_scheduler_type linear; kto: its default
        --resume --save-every 500 --keep-last 2)

# 128 conversations a step (README: 8 GPUs x 2 x 8 accumulated; log: 32 x 2 x 2)
sft=(--objective sft --lr 2e-5                                  # README: --learning_rate 2e-05
     --label-mask olmoe                                         # code: spans without BOS, on ids with it (--add_bos)
     --ce-divisor 64)           # README: --reduce_loss sum, which DeepSpeed averages over 32 GPUs and 2 accumulated
sft_step=128 sft_epochs=2 sft_batch=2                           # README: --num_train_epochs 2
sft_warmup=0.03                                                 # README: --warmup_ratio 0.03
sft_released=(9500 284.96875 9499.25)   # log: 9,500 steps; 9,119 and 303,976 ticks of the scheduler, 32 a step

# 32 pairs a step (README: 8 x 1 x 4; log: 32 x 1)
dpo=(--objective dpo --lr 5e-7 --beta 0.1                       # README: --learning_rate 5e-7, --dpo_beta 0.1
     --label-mask olmoe)                                        # code: as SFT's
dpo_step=32 dpo_epochs=3 dpo_batch=1                            # README: --num_train_epochs 3
dpo_warmup=0.1                                                  # README: --warmup_ratio 0.1
dpo_released=(5712 571.09375 5710.96875)    # log: 5,712 steps; 18,275 and 182,751 ticks, 32 a step

# 32 rows a step (README: 8 x 4). Of a schedule of 3 epochs, step 5,000 was chosen (paper, arXiv 2409.02060, Table 14)
kto=(--objective kto --lr 5e-7 --beta 0.1 --optimizer rmsprop)  # README: --learning_rate, --beta, --optim rmsprop
kto_step=32 kto_epochs=3 kto_batch=4                            # README: --num_train_epochs 3
kto_warmup=0                                                    # transformers' default: no warm-up
kto_most=5000

scripts=$(dirname -- "$(readlink -f -- "$0")")
olmoe=$(dirname -- "$scripts")/olmoe
die() { echo "olmoe_instruct.sh: $*" >&2; exit 1; }

model= out= hosts= gpus= released= dry= sft_data=() dpo_data=() kto_data=() more=()
while [ $# -gt 0 ]; do
    case $1 in
        --model | --out | --gpus | --hosts)
            [ $# -gt 1 ] || die "$1 needs a value"
            declare "${1#--}=$2"; shift 2;;
        --sft | --dpo | --kto)
            declare -n files=${1#--}_data
            option=$1; shift
            while [ $# -gt 0 ] && [[ $1 != --* ]]; do files+=("$1"); shift; done
            [ ${#files[@]} -gt 0 ] || die "$option needs files of rows";;
        --released-schedule) released=yes; shift;;
        --dry-run) dry=yes; shift;;
        --) shift; more=("$@"); break;;
        --help | -h) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "$0"; exit;;
        *) die "'$1' is no option; $0 --help lists them, and those of olmoe train come after --";;
    esac
done
[ -n "$model" ] && [ -n "$out" ] || die "--model DIR and --out OUT are needed; $0 --help describes them"
stages=()
for stage in sft dpo kto; do
    declare -n files=${stage}_data
    [ ${#files[@]} -eq 0 ] || stages+=("$stage")
    for file in "${files[@]}"; do [ -r "$file" ] || die "$file cannot be read"; done
done
[ ${#stages[@]} -gt 0 ] || die "no rows: give --sft FILES, --dpo FILES or --kto FILES"
[ ${#dpo_data[@]} -eq 0 ] || [ ${#kto_data[@]} -eq 0 ] || die "--dpo and --kto are two ways from SFT; give one of them"
[ -z "$hosts" ] || [ -r "$hosts" ] || die "$hosts cannot be read"
[ -r "$model/config.json" ] || die "$model holds no model: there is no config.json"
[ -x "$olmoe" ] || die "there is no $olmoe; make PRECISION=BF16 builds it"

# ------------------------------------------------------------------------------------------------
# Machine: what is spread over the GPUs, and how AdamW's state is kept (README of this repository; olmoe info --gpus N)

[ -n "$gpus" ] || gpus=${SLURM_NTASKS:-$({ nvidia-smi -L || true; } 2>/dev/null | wc -l)}
case $gpus in
    1 | 2 | 4) layout=(--master-weights remainder --moments bf16 --recompute 2);;       # 71 GB on one
    8 | 16 | 32) layout=(--recompute 1);;
    0) die "no GPU found; --gpus N starts N ranks";;
    *) die "--gpus $gpus: the 32 rows of a step need 1, 2, 4, 8, 16 or 32 GPUs";;
esac
[ "$gpus" -eq 1 ] || layout+=(--zero 1)
[ "$gpus" -le 8 ] || layout+=(--ep 8)                           # the experts' gradients stay within a machine

if [ -n "$hosts" ]; then launch=("$scripts/launch_hosts.sh" "$hosts")
elif [ -n "${SLURM_JOB_ID:-}" ]; then launch=("$scripts/launch_slurm.sh")
elif [ "$gpus" -gt 1 ]; then launch=(env "RANKS=$gpus" "$scripts/launch_node.sh")
else launch=("$olmoe" train)
fi

# ------------------------------------------------------------------------------------------------
# A run

shown() { printf '%q ' "$@" | sed 's/ $//'; echo; }

# The number of rows and bytes of files, gzipped or not
size_of() {
    local file
    for file; do
        case $file in *.gz) gzip -dc;; *) cat;; esac < "$file" 2>/dev/null || die "$file is damaged"
    done | wc -lc
}

# How long a stage takes and what memory, by olmoe info, for rows of their mean length, at four bytes a token
plan_of() {
    local stage=$1 steps=$2 rows=$3 bytes=$4 batch=$5 step=$6 sides=1 tokens epochs plan
    [ "$stage" != dpo ] || sides=2
    tokens=$((bytes / rows / sides / 4 + 1)); [ $tokens -le 4096 ] || tokens=4096
    epochs=$(awk -v steps="$steps" -v of="$((rows / step))" 'BEGIN { printf "%.6f", steps / of }')
    plan=$("$olmoe" info --model "$model" --objective "$stage" --gpus "$gpus" --batch "$batch" --global-batch "$step" \
           --seq 4096 --mean-length "$tokens" --rows "$rows" --epochs "$epochs" "${layout[@]}" 2>/dev/null) || true
    awk -F '[|]' -v tokens="$tokens" '
        $2 ~ /^ time: run / { sub(/: .*/, "", $3); time = $3 }
        $2 ~ /^ memory: sum / { sub(/ *$/, "", $3); memory = $3 }
        END { if (time == "") print "olmoe info has no plan for it"
              else printf "about%s, and%s a GPU, with rows of %d tokens by olmoe info\n", time, memory, tokens }' \
        <<< "$plan"
}

# The checkpoint that a stage ends with
result_of() { printf '%s/%s/step-%08d' "$out" "$1" "$2"; }

# Runs a command. A signal makes it save and end, which is no error.
run() {
    trap 'kill -TERM "${!-}" 2>/dev/null' INT TERM HUP
    setsid "$@" &
    local code=0; wait $! || code=$?
    while kill -0 $! 2>/dev/null; do code=0; wait $! || code=$?; done   # a signal ends the first wait
    trap - INT TERM HUP
    [ $code -eq 0 ] || exit $code
}

train() {
    local stage=$1 begin=$2 size rows bytes steps warmup decay
    declare -n options=$stage step=${stage}_step epochs=${stage}_epochs batch=${stage}_batch share=${stage}_warmup
    declare -n exact=${stage}_released data=${stage}_data
    size=$(size_of "${data[@]}")
    read -r rows bytes <<< "$size"
    steps=$((rows / step * epochs))         # an epoch's last rows, fewer than a step's, are not used
    [ $steps -gt 0 ] || die "$stage: $rows rows are fewer than the $step of a step"
    decay=$steps
    if [ "$stage" = kto ]; then
        decay=$(((rows + step - 1) / step * epochs))            # transformers counts an epoch's last rows as a step
        [ $steps -le $kto_most ] || steps=$kto_most
    elif [ -n "$released" ]; then
        steps=${exact[0]} warmup=${exact[1]} decay=${exact[2]}
    fi
    [ -n "${warmup:-}" ] || warmup=$(awk -v n="$decay" -v share="$share" 'BEGIN { printf "%.10g", n * share }')
    [ $((batch * gpus)) -le "$step" ] || batch=$((step / gpus))
    [ "$gpus" -gt 4 ] || batch=1
    local command=("${launch[@]}" "${options[@]}" "${common[@]}" "${layout[@]}" --batch "$batch" --global-batch "$step"
                   --steps "$steps" --warmup "$warmup" --decay-steps "$decay" --model "$begin" --data "${data[@]}"
                   --out "$out/$stage" "${more[@]}")
    echo "# $stage: $rows rows, $steps steps; $(plan_of "$stage" "$steps" "$rows" "$bytes" "$batch" "$step")"
    result=$(result_of "$stage" "$steps")
    shown "${command[@]}"
    [ -z "$dry" ] || return 0
    [ ! -d "$result" ] || { echo "# $stage is done: $result"; return 0; }
    mkdir -p -- "$out" || die "cannot make the directory $out"
    run "${command[@]}"
    [ -d "$result" ] || { echo "# $stage was stopped before step $steps; the same command goes on"; exit 0; }
}

result=$model
for stage in "${stages[@]}"; do train "$stage" "$result"; done
[ -n "$dry" ] || printf '# done: %q. To talk to it: olmoe generate --chat --model %q\n' "$result" "$result"
