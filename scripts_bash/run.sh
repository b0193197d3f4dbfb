# Sourced by scripts of several commands. `run COMMAND ...` ends the script if the command fails, or when a signal arrives,
# which it passes on. bash alone would wait until the command has ended, and then start the next one.
SIGNAL=''
for name in TERM INT HUP USR1; do
  trap "SIGNAL=$name; kill -s $name \$(jobs -p) 2>/dev/null || true" "$name"
done

run() {
  local child status=0
  set -m # a process group of its own: Ctrl-C reaches the command once, through the trap
  "$@" &
  child=$!
  set +m
  if [[ -n "$SIGNAL" ]]; then kill -s "$SIGNAL" "$child"; fi # it arrived before this command
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # a signal has ended the first wait
    wait "$child" || status=$?
  done
  if [[ -n "$SIGNAL" ]]; then
    echo "stopped by SIG$SIGNAL; rerun the same command to resume" >&2
    exit $((128 + $(kill -l "$SIGNAL")))
  fi
  if ((status > 0)); then exit "$status"; fi
}
