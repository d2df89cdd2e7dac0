
# ---- servers of rollouts on the last nodes. They take the weights of the run, so they want a token; it is in no file
GRPO_SERVER_TOKEN=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
export GRPO_SERVER_TOKEN
urls=() hosts=()
for node in "${nodes[@]:@NODES@}"; do
    hosts+=("$(address "$node")")
    for ((i = 0; i < @SERVERS_PER_NODE@; i++)); do urls+=("http://$(address "$node"):$((port + 1 + i))"); done
done
if ((told)); then finish 75; fi
serve=(srun --mpi=none --kill-on-bad-exit=1 --nodes=@SERVE_NODES@ --nodelist="$(comma "${nodes[@]:@NODES@}")"
       --ntasks=@SERVE_NODES@ --ntasks-per-node=1 --cpus-per-task=@SERVE_CPUS@
       bash -c 'hosts=($1); shift; exec "$@" --host="${hosts[$SLURM_PROCID]}"' serve "${hosts[*]}"
       @CONTAINER@@PYTHON@ -m grpo.rollout.standalone --port=$((port + 1)) --count=@SERVERS_PER_NODE@ @WORDS@)
(exec "${serve[@]}") &
servers=$!
trap 'kill "$servers" 2> /dev/null; wait "$servers" 2> /dev/null' EXIT
(exec @PYTHON@ -m launch.health --pid "$servers" "${urls[@]}") &
health=$!
if ((told)); then finish 75; fi
wait "$health"  # which a signal ends
ready=$?
if ((told)); then finish 75; fi
if ((ready)); then say "no servers of rollouts"; exit 1; fi
command+=(rollout.start=false "rollout.urls=[$(comma "${urls[@]}")]")
