from .attend import attention as attention, record_attention as record_attention
from .attentions import Attention as Attention, Calls as Calls, Unseen as Unseen
from .attention_call import AttentionCall as AttentionCall
from .between import Between as Between, flow_matrix as flow_matrix
from .flow import Flow as Flow, legrad as legrad, relevance as relevance, rollout as rollout
from .passes import Dense as Dense, Forward as Forward
