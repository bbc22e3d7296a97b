# From here on the same for every stage (megatron_btx/pipeline/slurm/batch.sh).
set -u
export PYTHONUNBUFFERED=1
export SLURM_EXPORT_ENV=ALL # srun would inherit --export=NONE, and find nothing
asked='' step=''

say() { printf '%(%F %T)T %s: %s\n' -1 "$stage" "$*"; }

# Ahead of the time limit Slurm sends USR1 to this script. It goes on to srun, which passes it to
# every rank: they save, leave stopped.json and end. TERM (the job is cancelled, requeued or
# preempted) reaches the ranks from Slurm, and then what becomes of the job is Slurm's decision.
# shellcheck disable=SC2317,SC2329 # it is reached through the traps
pass_on() {
  asked=$1
  say "asked to stop ($asked)"
  if [ "$asked" = USR1 ] && [ -n "$step" ]; then kill -s USR1 "$step" 2>/dev/null; fi
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

requeue() {
  say "requeued: $1"
  if scontrol requeue "$SLURM_JOB_ID"; then exit 0; fi
  say "Slurm refuses to requeue it; submit again to go on"
  exit 75
}

# One task a node. Each must see the run's directory; the first makes the stage's ready for another
# attempt, unless the stage is done, or has been restarted too often without getting on.
begun=$(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
  --cpus-per-task=1 "${launch[@]}" "$python" -m megatron_btx.pipeline.slurm.attempt "$recipe" "$stage")
code=$?
if [ "$asked" = USR1 ]; then requeue "nothing had begun"; fi
if [ "$code" != 0 ]; then exit "$code"; fi
read -r _ BTX_ATTEMPT BTX_STAGE_KEY directory < <(grep '^begun ' <<<"$begun")
if [ "$BTX_ATTEMPT" = 0 ]; then
  say "is done already"
  exit 0
fi
export BTX_ATTEMPT BTX_STAGE_KEY

# Where the ranks meet. Several jobs may share a node, so the port follows from the job.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT

log=$directory/log/attempt-$BTX_ATTEMPT.log
say "attempt $BTX_ATTEMPT on $SLURM_JOB_NODELIST: $log"
srun --kill-on-bad-exit=1 --cpus-per-task="$cpus" --label "${launch[@]}" \
  "$python" -m megatron_btx.cli stage "$recipe" "$stage" >>"$log" 2>&1 &
step=$!
if [ "$asked" = USR1 ]; then kill -s USR1 "$step"; fi
seconds=0
while kill -0 "$step" 2>/dev/null; do # a trap ends `wait` before the ranks have ended
  if [ "$asked" = USR1 ]; then        # said again and again: an srun that is starting may lose it
    sleep 1
    if [ $((++seconds % 5)) = 0 ]; then kill -s USR1 "$step" 2>/dev/null; fi
  else
    wait "$step"
  fi
done
wait "$step"
code=$?

# How it ended is what the files say; an exit code passes through too many hands.
if [ -e "$directory/done.json" ]; then
  say "done"
  exit 0
fi
if [ "$asked" != TERM ] && [ -e "$directory/stopped.json" ]; then
  requeue "the ranks have saved"
fi
if [ "$asked" = USR1 ] && [ ! -e "$directory/error.json" ]; then
  requeue "the ranks had nothing to save yet"
fi
say "ended without being done (srun: $code); the end of $log:"
tail -n 20 "$log"
exit $((code ? code : 1))
