"""Predictions on the transfer set: payloads, consensus rules and their codes."""

from tff_kd import _lazy

__getattr__, __dir__ = _lazy.attach(
    __name__,
    ['alignment', 'codecs', 'coded', 'consensus', 'payload', 'rules'],
    {
        'alignment': ['Aligned'],
        'coded': ['CodedRule', 'Quantized', 'TopClasses'],
        'consensus': [
            'CertaintyWeighted', 'CertaintyWithDiversity', 'check_rule', 'ConsensusRule',
            'MeanLogits', 'MeanProbabilities', 'WrappedRule',
        ],
        'payload': [
            'class_probabilities', 'Consensus', 'consensus_of', 'finite_rows',
            'KnowledgePayload', 'logits_shape', 'mean_of', 'payload_of',
            'predict_logits', 'without_rows',
        ],
    },
)
