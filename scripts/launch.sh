# 启动脚本的共同部分：有几块 GPU 就开几个进程，一台或多台机器。
# What the run_*.sh have in common: as many processes as there are GPUs, on one machine or several. To be sourced.
#
#   NPROC        processes on this machine; default: its GPUs, of which CUDA_VISIBLE_DEVICES may name some. Without any GPU
#                one process on the CPU
#   NNODES       machines, 1. With more, start the same command on each of them, and tell it
#   NODE_RANK    its number, from 0,
#   MASTER_ADDR  and the address of number 0;
#   MASTER_PORT  there, 29500

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
        where=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?is the number of this machine, from 0 to NNODES - 1}"
               --master_addr "${MASTER_ADDR:?is the address of machine 0}" --master_port "${MASTER_PORT:-29500}")
    fi
    torchrun "${where[@]}" --nproc_per_node "$processes" "$script" --ddp "$@"
}
