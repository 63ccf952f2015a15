"""What a process is: its device, ranks and groups, signals, locks, heartbeat, kernels.

Where CPU and CUDA differ is here (``device``, ``cuda_on_cpu``).  May import ``config``.
"""
