from sadmoe.reference import dynamic_k_moe, dynamic_k_select, router_scores, sparse_experts  # INTERIM: replaced by the compiled ops soon
