"""PPO from pixels with SAM3's mask as a fourth channel, or with the background blanked.

python examples/ppo_with_sam3.py --checkpoint checkpoints/sam3.pt --prompts cart pole

The mask comes from an appended transform; everything else is standard TorchRL. SAM3 segments each
frame when it is collected, so this needs a CUDA device. With ``tiny`` as the checkpoint, a small
random model shows on any machine that everything runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import gettempdir

import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from w2f_torchrl.envs import make_env
from w2f_torchrl.transforms import SAM3MaskTransform


class Encoder(nn.Module):
    """Encode pixels and mask; ``blank`` hides the background instead of adding a channel."""

    def __init__(self, outputs: int, *, blank: bool) -> None:
        super().__init__()
        self.blank = blank
        self.layers = nn.Sequential(
            *(nn.Conv2d(3 if blank else 4, 16, 8, 4), nn.ReLU()),
            *(nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.Flatten(-3)),
            *(nn.LazyLinear(128), nn.ReLU(), nn.Linear(128, outputs)),
        )

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """Map uint8 ``[*B, 3, H, W]`` and bool ``[*B, 1, H, W]`` to ``[*B, outputs]``."""
        images, batch = pixels / 255, pixels.shape[:-3]
        images = images * mask if self.blank else torch.cat([images, mask.float()], -3)
        return self.layers(images.flatten(0, -4) if batch else images[None]).view(*batch, -1)


def build(env: EnvBase, *, blank: bool) -> tuple[ProbabilisticActor, ValueOperator]:
    """Make the actor and the critic; both read pixels and mask."""
    size, keys = env.action_spec.shape[-1], ["pixels", "foreground_mask"]
    features = TensorDictModule(Encoder(2 * size, blank=blank), keys, ["parameters"])
    split = TensorDictModule(NormalParamExtractor(), ["parameters"], ["loc", "scale"])
    policy = ProbabilisticActor(
        TensorDictSequential(features, split),
        in_keys=["loc", "scale"],
        spec=env.action_spec,
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    return policy, ValueOperator(Encoder(1, blank=blank), in_keys=keys)


def train(args: argparse.Namespace) -> list[float]:
    """Collect, update, and return the mean reward of each batch."""
    torch.manual_seed(args.seed)
    env = make_env("cartpole", "balance", num_envs=args.envs, foreground_mask=False)
    transform = SAM3MaskTransform(
        args.prompts,
        checkpoint=args.checkpoint,
        resolution=args.resolution,
        score_threshold=args.score_threshold,
    )
    env.append_transform(transform)
    policy, critic = build(env, blank=args.blank)
    reset = env.reset()
    policy(reset.clone()), critic(reset.clone())  # initialise the lazy layers
    loss = ClipPPOLoss(policy, critic, entropy_coeff=1e-3)
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4)
    collector = Collector(
        env, policy, frames_per_batch=args.batch, total_frames=args.frames, device="cpu"
    )
    rewards = []
    for batch in collector:
        for _ in range(args.epochs):
            with torch.no_grad():
                data = advantage(batch).reshape(-1)
            for part in data[torch.randperm(len(data))].split(64):
                terms = loss(part)
                total = sum(value for key, value in terms.items() if key.startswith("loss_"))
                optimizer.zero_grad()
                total.backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
        rewards.append(float(batch["next", "reward"].mean()))
        print(f"reward {rewards[-1]:.3f}, mask {batch['foreground_mask'].float().mean():.1%}")
    collector.shutdown()
    return rewards


def main(arguments: list[str] | None = None) -> list[float]:
    """Read the command line, then train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="SAM3's weights, or tiny (default: from Hugging Face)")
    parser.add_argument("--prompts", nargs="+", default=["cart", "pole"])
    parser.add_argument("--resolution", type=int, default=336)
    parser.add_argument("--score-threshold", type=float, default=0.5)
    parser.add_argument("--blank", action="store_true", help="blank the background instead")
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--frames", type=int, default=200_000, help="total agent steps")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.checkpoint == "tiny":
        from w2f_torchrl.segmenters.sam3 import save_tiny_sam3

        args.checkpoint = save_tiny_sam3(Path(gettempdir()) / "tiny_sam3.pt")
        args.resolution, args.score_threshold = 112, 0.1
    return train(args)


if __name__ == "__main__":
    main()
