#!/bin/bash
# A Slurm job of two machines with four GPUs each. It survives time limits and preemption: Slurm
# sends SIGTERM, the run finishes its step and saves, and the job goes back into the queue.
#SBATCH --job-name=dino-mx --nodes=2 --ntasks-per-node=1 --gpus-per-node=4 --cpus-per-task=32
#SBATCH --time=12:00:00 --requeue --open-mode=append
#SBATCH --signal=TERM@300    # five minutes before the end: finish the step, save, leave
out=/shared/out/pathmnist node0=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -1)
srun torchrun --nnodes=$SLURM_NNODES --nproc_per_node=4 --shutdown-timeout=240 \
    --rdzv_backend=c10d --rdzv_id=$SLURM_JOB_ID-$SLURM_RESTART_COUNT --rdzv_endpoint=$node0:29500 \
    train.py config/pathmnist.py config/dinov2.py --out_dir=$out --resume_from=auto
tail -n 2 $out/logs/train.log | grep -q "stopped by a signal" && scontrol requeue $SLURM_JOB_ID
