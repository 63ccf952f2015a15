"""FusedAdam and multi-tensor functions: the real ones' state and arguments, torch's arithmetic."""

import torch

_PIECE = 2**20


class FusedAdam(torch.optim.Optimizer):
    """Adam whose groups count their steps, and whose state has moments alone."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                 amsgrad=False, *, bias_correction=True, adam_w_mode=True, capturable=False,
                 master_weights=False, master_weight_dtype=torch.float32,
                 exp_avg_dtype=torch.float32, exp_avg_sq_dtype=torch.float32,
                 use_decoupled_grad=False, store_param_remainders=False,
                 set_grad_none=None) -> None:  # fmt: skip
        assert adam_w_mode and not (amsgrad or capturable or master_weights)
        defaults = {
            "lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps,
            "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults)
        self._dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}

    def get_unscaled_state(self, param, state_name, skip_unscale=False):
        """Raises KeyError for any state but the moments, as the real one does."""
        assert self.state[param][state_name].dtype == self._dtypes[state_name]
        return self.state[param][state_name]

    def set_scaled_state(self, param, state_name, unscaled_state):
        """As above."""
        assert unscaled_state.dtype == self._dtypes[state_name] == torch.float32
        self.state[param][state_name] = unscaled_state.clone()

    def initialize_state(self, param, store_param_remainders):
        """Zero moments."""
        self.state[param].update({name: torch.zeros_like(param) for name in self._dtypes})

    def state_dict(self):
        """torch's, each entry through :meth:`get_unscaled_state`."""
        for param, state in self.state.items():
            for name in state:
                self.get_unscaled_state(param, name)
        return super().state_dict()

    def load_state_dict(self, state_dict):
        """torch's, then each entry again through :meth:`set_scaled_state`."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for number, state in state_dict["state"].items():
            self.state[params[number]] = {}
            for name, value in state.items():
                self.set_scaled_state(params[number], name, value.float())

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        """As Adam's kernel, which has one step for the whole group."""
        for group in (g for g in self.param_groups if g["params"]):
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            first, second = (
                1 - beta ** group["step"] if group["bias_correction"] else 1
                for beta in (beta1, beta2)
            )
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    self.initialize_state(p, False)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                # A piece at a time: as the kernel, it takes no memory of the parameter's size.
                pieces = (t.view(-1).split(_PIECE) for t in (p, p.grad, m, v))
                for p_, g_, m_, v_ in zip(*pieces, strict=True):
                    m_.mul_(beta1).add_(g_, alpha=1 - beta1)
                    v_.mul_(beta2).addcmul_(g_, g_, value=1 - beta2)
                    update = (m_ / first) / ((v_ / second).sqrt() + group["eps"])
                    p_.sub_(group["lr"] * (update + group["weight_decay"] * p_))


class FusedSGD(torch.optim.Optimizer):
    """Only imported."""

    def __init__(self, params) -> None:
        raise NotImplementedError


def multi_tensor_l2norm(chunk, noop, lists, per_tensor=False):
    """The norm of all tensors, and of each where asked for."""
    norms = torch.stack([t.float().norm() for t in lists[0]])
    return norms.norm()[None], norms if per_tensor else torch.empty(0)


def multi_tensor_scale(chunk, noop, lists, scale):
    """The first list times ``scale`` into the second."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_applier(op, noop_flag_buffer, tensor_lists, *args):
    """Calls the function."""
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)
