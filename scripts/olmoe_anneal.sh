#!/usr/bin/env bash
# The last phase of OLMoE-1B-7B's pretraining: 100 B tokens, over which the learning rate falls in a line to 0.
#
#   scripts/olmoe_anneal.sh --model DIR --data FILES --out OUT [--gpus N] [-- options of olmoe train]
#
#   --model DIR             the model to begin with: a Hugging Face directory, or a checkpoint of olmoe train. Of the
#                           released ones it is the revision step1200000-tokens5033B (REVISION of download.sh)
#   --data FILES            token files. FILE:2 counts twice, FILE:0.5 is the first half of its sequences: the mix
#   --steps S               a shorter run, whose learning rate is 0 at step S (default: 23842)
#   --gpus N                a power of 2 up to 256 (default: those of this machine)
#   --hosts HOSTFILE        on several machines, by launch_hosts.sh. In a job of Slurm's, launch_slurm.sh is used
#   --dry-run               print the command, and what time and memory `olmoe info` plans for it; run nothing
#
# The result is OUT/step-00023842. Ctrl-C and SIGTERM save; the same command goes on. Options after -- take the place of
# those below.
#
# Sources: "config" is configs/ablations/olmoe-8x1b-newhp-newds-final-anneal.yml of github.com/allenai/OLMoE. What is
# taken from it is also in dolmino-anneal/olmoe-8x1b-newhp-newds-dolmino-seed-42.yml there: the annealing of a later
# OLMoE on a mix, whose list of files has some twice. "code" is olmo/ of allenai/OLMo, branch Muennighoff/MoE.
#
# As released: the trainer begins anew, at step 0 of epoch 0 (config: reset_trainer_state true). The released run's data
# were those of the whole pretraining in a new order; which ones are given here is up to the caller.
# Not as released: the released run went on with AdamW's moments (config: reset_optimizer_state false). --model takes
# weights alone, of a checkpoint too. So the moments begin at 0, and the first updates move each weight by about the
# learning rate; and in a BF16 build the master weights begin as the rounded ones of model.safetensors.
set -euo pipefail

recipe=(--seq 4096 --global-batch 1024              # config: max_sequence_length, global_train_batch_size
        --batch 4                                   # config: device_train_microbatch_size; each has its own balance
        --lr 4e-5                                   # config: learning_rate. (One revision of the paper has 5e-4)
        --schedule anneal                           # config: linear_with_warmup, t_warmup 0, alpha_f 0
        --seed 42                                   # config: seed, here of the order of the data
        --beta1 0.9 --beta2 0.95 --eps 1e-8 --weight-decay 0.1      # config: optimizer, of all parameters
        --grad-clip 1                               # config: max_grad_norm
        --lb-coef 0.01 --z-coef 0.001               # config: moe_loss_weight, moe_zloss_weight
        --lb rank --ce-divisor all --order global)  # code: of each micro-batch; over all positions; shuffled
steps=23842                                         # config: stop_at. They are 100 B tokens (max_duration)
saving=(--resume --save-every 1000 --keep-last 2)   # chosen here

scripts=$(dirname -- "$(readlink -f -- "$0")")
olmoe=$(dirname -- "$scripts")/olmoe
die() { echo "olmoe_anneal.sh: $*" >&2; exit 1; }

model= out= hosts= gpus= dry= data=() more=()
while [ $# -gt 0 ]; do
    case $1 in
        --model | --out | --gpus | --hosts | --steps)
            [ $# -gt 1 ] || die "$1 needs a value"
            declare "${1#--}=$2"; shift 2;;
        --data)
            shift
            while [ $# -gt 0 ] && [[ $1 != --* ]]; do data+=("$1"); shift; done;;
        --dry-run) dry=yes; shift;;
        --) shift; more=("$@"); break;;
        --help | -h) sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' "$0"; exit;;
        *) die "'$1' is no option; $0 --help lists them, and those of olmoe train come after --";;
    esac
done
[ -n "$model" ] && [ -n "$out" ] || die "--model DIR and --out OUT are needed; $0 --help describes them"
[ ${#data[@]} -gt 0 ] || die "no data: give --data FILES of tokens"
for file in "${data[@]}"; do [ -r "$file" ] || [ -r "${file%:*}" ] || die "$file cannot be read"; done
[[ $steps =~ ^[1-9][0-9]{0,8}$ ]] || die "--steps $steps: not a number of steps"
[ -z "$hosts" ] || [ -r "$hosts" ] || die "$hosts cannot be read"
[ -r "$model/config.json" ] || die "$model holds no model: there is no config.json"
[ -x "$olmoe" ] || die "there is no $olmoe; make PRECISION=BF16 builds it"

# Machine: what is spread over the GPUs, and how AdamW's state is kept (README of this repository; olmoe info --gpus N)
[ -n "$gpus" ] || gpus=${SLURM_NTASKS:-$({ nvidia-smi -L || true; } 2>/dev/null | wc -l)}
case $gpus in
    1) layout=(--master-weights remainder --moments bf16 --recompute 2);;       # 76 GB
    2) layout=(--master-weights remainder --recompute 2 --zero 1);;             # 69 GB
    4 | 8) layout=(--recompute 1 --zero 1);;                                    # 68 and 58 GB
    16 | 32 | 64 | 128 | 256) layout=(--recompute 1 --zero 1 --ep 8);;  # the experts' gradients stay within a machine
    0) die "no GPU found; --gpus N starts N ranks";;
    *) die "--gpus $gpus: 1024 sequences in micro-batches of 4 need a power of 2, up to 256";;
esac

if [ -n "$hosts" ]; then launch=("$scripts/launch_hosts.sh" "$hosts")
elif [ -n "${SLURM_JOB_ID:-}" ]; then launch=("$scripts/launch_slurm.sh")
elif [ "$gpus" -gt 1 ]; then launch=(env "RANKS=$gpus" "$scripts/launch_node.sh")
else launch=("$olmoe" train)
fi

# How long the run takes on several GPUs, and what memory, by olmoe info
plan=$("$olmoe" info --model "$model" --gpus "$gpus" --batch 4 --global-batch 1024 --seq 4096 "${layout[@]}" \
       2>/dev/null) || true
plan=$(awk -F '[|]' -v steps="$steps" '
    $2 ~ /^ memory: sum / { sub(/ *$/, "", $3); memory = $3 }
    $2 ~ /^ time: step / { hours = steps * $3 / 3.6e6 }
    END { if (memory == "") print "olmoe info has no plan for it"
          else print (hours > 0 ? sprintf("about %.3g h, and", hours) : "about") memory " a GPU, by olmoe info" }' \
    <<< "$plan")

command=("${launch[@]}" "${recipe[@]}" --steps "$steps" "${layout[@]}" "${saving[@]}" --model "$model"
         --data "${data[@]}" --out "$out" "${more[@]}")
result=$(printf '%s/step-%08d' "$out" "$steps")
echo "# anneal: $steps steps of 4,194,304 tokens; $plan"
printf '%q ' "${command[@]}" | sed 's/ $//'; echo
[ -z "$dry" ] || exit 0
[ ! -d "$result" ] || { echo "# anneal is done: $result"; exit 0; }
exec "${command[@]}"
