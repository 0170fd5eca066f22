#!/bin/sh
# Works off the flows' runs. A program that speaks to Ray must run on a node of the cluster, so
# this machine joins it first, with nothing to compute on.
set -eu
ray start --address="$RAY_ADDRESS" --num-cpus=0 --num-gpus=0 --disable-usage-stats
exec prefect worker start --pool genarena --type process --with-healthcheck
