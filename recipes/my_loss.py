"""A user-defined loss, to copy:

    dpo-run stage=dpo stage.loss=file stage.loss_file=recipes/my_loss.py

The file runs with your permissions; it must be set on the command line.
"""

from torch.nn.functional import logsigmoid


def loss(logprobs, beta):
    """Losses of E pairs: (E,).

    logprobs.policy, logprobs.reference: (E, 2) log-probabilities, summed over tokens, chosen first;
    logprobs.lengths: (E, 2) tokens. beta: stage.beta. This one is DPO with a margin of 1.
    """
    logratios = logprobs.policy - logprobs.reference
    return -logsigmoid(beta * (logratios[:, 0] - logratios[:, 1]) - 1.0)
