# 启动脚本的共同部分：有几块 GPU 就开几个进程，一台或多台机器。
# Sourced by run_*.sh: torchrun with one process per GPU, on one machine or several. Variables:
#
#   NPROC        processes on this machine; default: its visible GPUs, else one process on the CPU
#   NNODES       number of machines; default: 1. With more, start the same command on each of them
#   NODE_RANK    number of this machine, from 0 to NNODES - 1
#   MASTER_ADDR  address of machine 0
#   MASTER_PORT  port of machine 0; default: 29500

launch() {  # SCRIPT ARGUMENTS ...: the script under torchrun
    local script=$1 processes=${NPROC:-} where=(--standalone)
    shift
    if [ -z "$processes" ]; then
        processes=$(python -c "import torch; print(torch.cuda.device_count())")
        if [ "$processes" = 0 ]; then
            processes=1
            echo "no GPU is visible: one process on the CPU; NPROC=2 makes it two" >&2
        fi
    fi
    if [ "${NNODES:-1}" != 1 ]; then
        where=(--nnodes "$NNODES"
               --node_rank "${NODE_RANK:?is the number of this machine, from 0 to NNODES - 1}"
               --master_addr "${MASTER_ADDR:?is the address of machine 0}"
               --master_port "${MASTER_PORT:-29500}")
    fi
    torchrun "${where[@]}" --nproc_per_node "$processes" "$script" --ddp "$@"
}
