# From here on the same for every stage (megatron_btx/pipeline/slurm/batch.sh).
set -u
export PYTHONUNBUFFERED=1
export SLURM_EXPORT_ENV=ALL # srun would inherit --export=NONE, and find nothing
asked='' step=''
started=${SLURM_RESTART_COUNT:-0}
# The number alone of an array's last job is that of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

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

# The words of a command that failed do not tell whether the controller refuses or is silent.
answers() { scontrol ping 2>/dev/null | grep -q ' is UP'; }

# Whether srun failed because the controller was away; its words are the argument.
away() { ! answers || grep -q 'slurm controller' <<<"$1"; }

restarts() {
  scontrol -o show job "$job" 2>/dev/null | sed -n 's/.* Restarts=\([0-9]*\) .*/\1/p'
}

# Asks until the controller counts one restart more: one that is silent is asked again, one that was
# killed may have forgotten what it had accepted. Then Slurm ends this script (TERM), unless it is on
# a node that Slurm has lost. The exit code says failure, lest what waits for this job is started.
requeue() {
  local counted answer most refused=0 over=0
  say "requeued: $1"
  while [ "$asked" != TERM ] && [ "$over" -lt 30 ]; do
    counted=$(restarts)
    if [ -n "$counted" ] && [ "$counted" != "$started" ]; then
      over=$((over + 1))
    elif answer=$(scontrol requeue "$job" 2>&1); then
      refused=0
    elif answers; then
      refused=$((refused + 1)) # for a while if it may be for the moment: nodes register anew
      if [[ $answer =~ disabled|denied|Invalid ]]; then most=3; else most=30; fi
      if [ "$refused" -ge "$most" ]; then
        say "Slurm refuses to requeue it ($answer); submit again to go on"
        tell "Slurm refuses to requeue it ($answer); submit again to go on"
        break
      fi
    else
      say "the controller does not answer; it is asked again until it does"
      refused=0
    fi
    sleep 2
  done
  exit 75
}

# What must reach a person where no file can be written: the job's comment.
tell() {
  local text=${1//[$'\n\r|']/ }
  if [ -z "$text" ]; then return; fi
  scontrol update job="$job" comment="btx: ${text:0:500}" >/dev/null 2>&1
}

# One task a node. Each must see the run's directory; the first makes the stage's ready for another
# attempt, unless the stage is done, or has been restarted too often without getting on.
begin() {
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task=1 "${launch[@]}" \
    "$python" -m megatron_btx.pipeline.slurm.attempt "$recipe" "$stage" 2>&1
}

while :; do
  begun=$(begin | tee -p >(grep -v --line-buffered '^begun ' >&2) && exit "${PIPESTATUS[0]}")
  code=$?
  if [ "$code" = 0 ] || [ -n "$asked" ] || ! away "$begun"; then break; fi
  say "the controller does not answer; it is asked again until it does"
  sleep 5
done
if [ "$asked" = USR1 ]; then requeue "the time limit came before the stage began"; fi
if grep -q '^busy$' <<<"$begun"; then requeue "ranks live on, on a node that was lost"; fi
if [ "$code" != 0 ]; then
  tell "$(grep -m 1 '^error: ' <<<"$begun" | cut -c 8-)"
  exit "$code"
fi
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
if [ "$asked" != TERM ] && grep -qs '"kind": "hang"' "$directory/error.json"; then
  requeue "a rank hangs: $(sed -n 's/.*"message": "\(.*\)\\n.*/\1/p' "$directory/error.json")"
fi
said=$(tail -n 20 "$log")
if [ -z "$asked" ] && [ ! -e "$directory/error.json" ] && away "$said"; then
  requeue "the controller was away"
fi
say "ended without being done (srun: $code); the end of $log:"
printf '%s\n' "$said"
if [ ! -e "$directory/error.json" ]; then
  trial=$directory/.space.$$.tmp
  head -c 1048576 /dev/zero 2>/dev/null >"$trial" || full=yes
  rm -f "$trial"
  if [ -n "${full:-}" ]; then
    tell "$directory: no space left on its disk; free some and submit again"
  fi
fi
exit $((code ? code : 1))
