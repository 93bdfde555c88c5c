"""What scores a completion: reward models, classifiers, word lists, the policy itself."""
