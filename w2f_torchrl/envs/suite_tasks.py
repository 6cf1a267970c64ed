"""The Control Suite's tasks by domain, so that a name can be checked without importing it.

A test compares the table with dm_control's.
"""

from __future__ import annotations

TASKS_BY_DOMAIN: dict[str, tuple[str, ...]] = {
    "acrobot": (
        "swingup",
        "swingup_sparse",
    ),
    "ball_in_cup": ("catch",),
    "cartpole": (
        "balance",
        "balance_sparse",
        "swingup",
        "swingup_sparse",
        "two_poles",
        "three_poles",
    ),
    "cheetah": ("run",),
    "dog": (
        "stand",
        "walk",
        "trot",
        "run",
        "fetch",
    ),
    "finger": (
        "spin",
        "turn_easy",
        "turn_hard",
    ),
    "fish": (
        "upright",
        "swim",
    ),
    "hopper": (
        "stand",
        "hop",
    ),
    "humanoid": (
        "stand",
        "walk",
        "run",
        "run_pure_state",
    ),
    "humanoid_CMU": (
        "stand",
        "walk",
        "run",
    ),
    "lqr": (
        "lqr_2_1",
        "lqr_6_2",
    ),
    "manipulator": (
        "bring_ball",
        "bring_peg",
        "insert_ball",
        "insert_peg",
    ),
    "pendulum": ("swingup",),
    "point_mass": (
        "easy",
        "hard",
    ),
    "quadruped": (
        "walk",
        "run",
        "escape",
        "fetch",
    ),
    "reacher": (
        "easy",
        "hard",
    ),
    "stacker": (
        "stack_2",
        "stack_4",
    ),
    "swimmer": (
        "swimmer6",
        "swimmer15",
    ),
    "walker": (
        "stand",
        "walk",
        "run",
    ),
}
