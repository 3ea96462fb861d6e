#!/usr/bin/env bash
# Every arena figure of docs/benchmarks.md, at its full size: benchmarks/arena.sh FOLDER OUT [PART ...]
# FOLDER holds the public data sets (see README.md), OUT is where runs, tables and pictures go. A part that was stopped
# goes on when it is asked for again. Parts: single qaedit sequential table every lora digits steer learn; all of them
# where none is named.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data=$1 out=$2
shift 2
parts=${*:-single qaedit sequential table every lora digits steer learn}
mkdir -p "$out"
# A workspace of its own: the arena wants the base model.
arena() {
    local name=$1
    shift
    liveweight arena --workspace "$out/workspace" --folder "$data" --out "$out/$name.json" --resume "$@"
}

for part in $parts; do
    case $part in
        single) arena single --data counterfact --methods implant --cases 200 --damage-every 10 ;;
        qaedit) arena qaedit --data qaedit --methods implant --held 0 --cases 200 --damage-every 10 ;;
        sequential) arena sequential --data counterfact --methods implant --cases 500 --mode sequential ;;
        table) arena table --data counterfact --methods all --cases 500 --mode sequential --measured 100 ;;
        every) arena every --data counterfact --methods all --cases 20 ;;
        lora) arena lora --data counterfact --methods implant,rome,lora --cases 20 --first 200 --damage-every 5 ;;
        digits) python benchmarks/digits.py --json "$out/digits.json" ;;
        steer) python benchmarks/steer.py --data "$data" --json "$out/steer.json" ;;
        learn) python benchmarks/learn.py --data "$data" --json "$out/learn.json" ;;
        *)
            echo "There is no part $part." >&2
            exit 2
            ;;
    esac
done
