"""A user-defined reward, to copy:

    dpo-run stage=ppo-baseline reward_fn=python reward_fn.file=recipes/my_reward.py

The file runs with your permissions; it must be set on the command line.
"""


def reward(prompts, completions):
    """One number per completion.

    prompts: as in the rows, strings or lists of messages; completions: strings. This one counts
    the distinct words.
    """
    return [len(set(completion.lower().split())) for completion in completions]
