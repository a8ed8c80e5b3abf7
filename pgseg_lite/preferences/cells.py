"""The cells of the study. Each is part of its own key, so that a new one costs the others nothing."""

EIGHT = (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)

# first: what the labels teach. second: the lesson on the rest, by name, and what is changed in it.
CELLS = {
    **{f"{share} %": dict(share=share / 100) for share in (10, 20, 30, 50)},
    **{f"{share} % + preferences": dict(share=share / 100, second="preferences") for share in (10, 20, 30, 50)},
    "labels again": dict(second="labels again"),
    "own masks": dict(second="own masks"),
    "true masks": dict(second="true masks"),
    "rating": dict(second="preferences", loss=dict(grading="rating")),
    "flipped 10 %": dict(second="preferences", flipped=0.1),
    "flipped 20 %": dict(second="preferences", flipped=0.2),
    "sum of pixels": dict(second="preferences", loss=dict(reading="sum")),
    "region of pixels": dict(second="preferences", loss=dict(reading="region")),
    "a tenth of beta": dict(second="preferences", loss=dict(beta1=0.1, beta2=0.05)),
    "best against worst": dict(second="preferences", loss=dict(beta2=0.0)),
    "eight thresholds": dict(second="preferences", thresholds=EIGHT),
    "rated by the group": dict(second="preferences", score="group", k=4),
    "rated by a regressor": dict(second="preferences", score="regressor"),
    "preferences in the group": dict(second="group preferences", k=4),
    "consistency on the rest": dict(second="consistency", k=4),
    "group training": dict(first="group", k=4),
    "with answers": dict(prompts=dict(answers=True)),
    "with answers + preferences": dict(second="preferences", prompts=dict(answers=True)),
    "with answers and box": dict(prompts=dict(answers=True, box=True)),
    "with answers and box + preferences": dict(second="preferences", prompts=dict(answers=True, box=True)),
}
