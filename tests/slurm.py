"""As much of Slurm as submitit asks for, in four small programs: arrays of jobs that requeue."""

from __future__ import annotations

from pathlib import Path

_PROGRAMS = {
    "sbatch": """
        cp "$1" "$SLURM_STUB/script"
        last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\)%.*/\\1/p' "$1")
        for task in $(seq 0 "$last"); do
          export SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_CPUS_ON_NODE=1
          (
            bash "$SLURM_STUB/script"
            while rm "$SLURM_STUB/requeued-7_$task"; do bash "$SLURM_STUB/script"; done
          ) >/dev/null 2>&1 &
        done
        echo "Submitted batch job 7"
    """,
    "srun": """
        log() { echo "$1" | sed "s/%A/7/g; s/%a/$SLURM_ARRAY_TASK_ID/g; s/%t/0/g"; }
        while [[ $1 == --* ]]; do
          case $1 in
            --output) out=$(log "$2"); shift ;;
            --error) err=$(log "$2"); shift ;;
          esac
          shift
        done
        mkdir -p "$(dirname "$out")"
        exec "$@" >>"$out" 2>>"$err"
    """,
    "scontrol": """test "$1" = requeue && touch "$SLURM_STUB/requeued-$2" """,
    "sacct": "exit 0",
}


def install(folder: Path) -> Path:
    """Write the programs into a folder, for PATH and SLURM_STUB; return where scripts will be."""
    folder.mkdir()
    for name, text in _PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)
    return folder / "script"
