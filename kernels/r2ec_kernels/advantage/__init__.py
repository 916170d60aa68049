"""RecPO's reward, and advantages within groups."""
