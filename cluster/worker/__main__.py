"""``python -m cluster.worker``: a worker, without the cost of loading the command line."""

from cluster.worker.boot import main

if __name__ == "__main__":
    main()
