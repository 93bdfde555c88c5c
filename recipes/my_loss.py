"""A loss of your own, to copy:

    dpo-run stage=dpo stage.loss=file stage.loss_file=recipes/my_loss.py

The file runs as any program of yours would; it must be named on the command line.
"""

from torch.nn.functional import logsigmoid


def loss(logprobs, beta):
    """The losses of E pairs, (E,).

    logprobs.policy, logprobs.reference: (E, 2) log-probabilities, summed over tokens, chosen first;
    logprobs.lengths: (E, 2) tokens. beta: stage.beta. This one is DPO with a margin of 1.
    """
    logratios = logprobs.policy - logprobs.reference
    return -logsigmoid(beta * (logratios[:, 0] - logratios[:, 1]) - 1.0)
