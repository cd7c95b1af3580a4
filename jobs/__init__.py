"""Entry points for jobs: each hands its arguments to the verb of the same name.

    ray job submit --working-dir . -- python jobs/train.py configs/quickstart.yaml run.storage=s3://bucket/runs

The job connects to the cluster that it runs on (Ray sets RAY_ADDRESS). Inputs and storage must be reached from every
node; relative paths lie in the working directory that was submitted. `ray-ft submit train …` does the same and checks
first (docs/jobs.md). Neither needs ray-ft installed on the nodes where the working directory holds it, as Ray puts that
on the path of the job and its workers; what ray-ft itself needs must be there.
"""

import os
import sys


def run(verb: str) -> None:
    """Be `ray-ft VERB` with this process's arguments, without a GPU.

    The entry point runs on the head node beside others and only directs: what computes are the workers, tasks and
    actors that ask Ray for GPUs. Where the head has GPUs, Ray leaves all of them visible to every entry point.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything looks
    from ray_ft.cli import main

    sys.argv.insert(1, verb)
    main()
