-- One row for each visit that can be judged by Sepsis-3, from suspicions, septic and sofa.
-- Reads: judged_visits, episodes, and what suspicion.sql, sofa.sql, sepsis3.sql make; variables `onset`, `by_stay`.
-- Makes: labelled.

CREATE OR REPLACE TABLE labelled AS
WITH first_suspicion AS (
    SELECT coalesce(e.judged_id, CASE WHEN NOT getvariable('by_stay') THEN s.visit_id END) AS visit_id,
           min_by(s, (s.suspicion_time, s.antibiotic_time, s.number)) AS s,
           bool_or(s.episode_id IS NOT NULL) AS in_episode
    FROM suspicions s LEFT JOIN episodes e USING (episode_id)
    WHERE s.suspicion_time IS NOT NULL
    GROUP BY ALL
),
-- of several septic episodes of a visit the one with the earliest onset
first_septic AS (
    SELECT e.judged_id AS visit_id, s.*,
           CASE getvariable('onset') WHEN 'suspicion' THEN suspicion_time WHEN 'sofa' THEN sofa_time
                WHEN 'later' THEN greatest(suspicion_time, sofa_time) ELSE least(suspicion_time, sofa_time) END AS onset
    FROM septic s JOIN episodes e USING (episode_id)
    QUALIFY row_number() OVER (PARTITION BY e.judged_id ORDER BY onset, suspicion_time, episode_id) = 1
),
worst AS (
    SELECT e.judged_id AS visit_id, f.*,
           bool_or(coalesce(respiration, coagulation, liver, cardiovascular, nervous, renal) IS NOT NULL)
               OVER (PARTITION BY e.judged_id) AS is_known
    FROM sofa f JOIN episodes e USING (episode_id)
    QUALIFY row_number() OVER (PARTITION BY e.judged_id ORDER BY score DESC, hour) = 1
),
-- SOFA at the onset of organ dysfunction; without sepsis the highest near a suspicion
shown AS (
    SELECT visit_id, sofa, respiration, coagulation, liver, cardiovascular, nervous, renal FROM first_septic
    UNION ALL
    SELECT visit_id, score, respiration, coagulation, liver, cardiovascular, nervous, renal
    FROM worst WHERE visit_id NOT IN (SELECT visit_id FROM first_septic)
)
SELECT v.visit_id, v.client, (s.visit_id IS NOT NULL)::TINYINT AS sepsis, s.onset AS sepsis_onset,
       coalesce(s.suspicion_time, f.s.suspicion_time) AS suspicion_time,
       coalesce(s.antibiotic_time, f.s.antibiotic_time) AS antibiotic_time,
       coalesce(s.culture_time, f.s.culture_time) AS culture_time,
       s.sofa_time, p.sofa::TINYINT AS sofa, p.respiration::TINYINT AS respiration, p.coagulation::TINYINT AS coagulation,
       p.liver::TINYINT AS liver, p.cardiovascular::TINYINT AS cardiovascular, p.nervous::TINYINT AS nervous,
       p.renal::TINYINT AS renal, v.visit_start,
       CASE WHEN e.judged_id IS NULL THEN 'no stay in intensive care'
            WHEN s.visit_id IS NULL AND f.in_episode AND NOT coalesce(w.is_known, false)
            THEN 'infection suspected, but nothing of SOFA measured near it' END AS left_out
FROM judged_visits v
LEFT JOIN (SELECT DISTINCT judged_id FROM episodes) e ON e.judged_id = v.visit_id
LEFT JOIN first_septic s ON s.visit_id = v.visit_id
LEFT JOIN first_suspicion f ON f.visit_id = v.visit_id
LEFT JOIN worst w ON w.visit_id = v.visit_id
LEFT JOIN shown p ON p.visit_id = v.visit_id;
