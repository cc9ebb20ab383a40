"""``python -m cluster`` is the ``cluster`` command."""

from cluster.cli.main import app

if __name__ == "__main__":
    app(prog_name="cluster")
