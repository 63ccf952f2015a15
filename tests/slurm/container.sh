#!/usr/bin/env bash
# Stands for a container's runtime: notes where it ran, and runs the command.
touch "$LOGS/container-on-$(hostname)"
exec "$@"
