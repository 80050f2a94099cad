#!/usr/bin/env python3
"""GRPO training with the router in it; docs/grpo.md is the guide.

    python examples/run_grpo.py --config examples/configs/grpo_with_router_example.yaml [key=value ...]

Overrides are in Hydra's form: grpo.router.enabled=false, ++policy.optimizer.kwargs.eps=1e-6, ~grpo.val_period.
"""

from kvrouter.grpo.command import main

if __name__ == "__main__":
    main()
