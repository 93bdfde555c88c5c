"""A reward of your own, to copy:

    dpo-run stage=ppo-baseline reward_fn=python reward_fn.file=recipes/my_reward.py

The file runs as any program of yours would; it must be named on the command line.
"""


def reward(prompts, completions):
    """One number per completion.

    prompts: as your rows have them, texts or lists of messages; completions: texts. This one counts
    the distinct words.
    """
    return [len(set(completion.lower().split())) for completion in completions]
