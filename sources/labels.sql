-- One row for each visit that can be judged by Sepsis-3, from suspicions, septic and sofa.
-- Reads: judged_visits, episodes, and what suspicion.sql, sofa.sql, sepsis3.sql make. Makes: labelled.

CREATE OR REPLACE TABLE labelled AS
WITH first_suspicion AS (
    SELECT v.visit_id, min_by(s, (s.suspicion_time, s.antibiotic_time, s.number)) AS s,
           bool_or(s.episode_id IS NOT NULL) AS in_episode
    FROM suspicions s
    LEFT JOIN episodes e USING (episode_id)
    JOIN judged_visits v ON v.visit_id IN (e.judged_id, s.visit_id)
    WHERE s.suspicion_time IS NOT NULL
    GROUP BY v.visit_id
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
)
SELECT v.visit_id, v.client, (s.visit_id IS NOT NULL)::TINYINT AS sepsis, s.onset AS sepsis_onset,
       coalesce(s.suspicion_time, f.s.suspicion_time) AS suspicion_time,
       coalesce(s.antibiotic_time, f.s.antibiotic_time) AS antibiotic_time,
       coalesce(s.culture_time, f.s.culture_time) AS culture_time,
       s.sofa_time, coalesce(s.sofa, w.score)::TINYINT AS sofa,
       {parts},
       v.visit_start,
       CASE WHEN e.judged_id IS NULL THEN 'no stay in intensive care'
            WHEN s.visit_id IS NULL AND f.in_episode AND NOT coalesce(w.is_known, false)
            THEN 'infection suspected, but nothing of SOFA measured near it' END AS left_out
FROM judged_visits v
LEFT JOIN (SELECT DISTINCT judged_id FROM episodes) e ON e.judged_id = v.visit_id
LEFT JOIN first_septic s ON s.visit_id = v.visit_id
LEFT JOIN first_suspicion f ON f.visit_id = v.visit_id
LEFT JOIN worst w ON w.visit_id = v.visit_id;
