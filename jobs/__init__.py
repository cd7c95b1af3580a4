"""Entry points for `ray job submit`: each hands its arguments to the verb of the same name.

    ray job submit --working-dir . -- python jobs/train.py configs/quickstart.yaml run.storage=s3://bucket/runs

The job connects to the cluster it runs on (RAY_ADDRESS is set by Ray). Inputs and storage must be reachable from every
node; relative paths lie in the working directory that was submitted.
"""
