-- Sepsis-3: suspicion of infection with organ dysfunction (Singer et al., JAMA 2016;315:801, doi 10.1001/jama.2016.0287).
-- Reads: suspicions, sofa; variable `rise`. Makes: septic (one row for each septic episode).
--
--   rise = false  SOFA of 2 or more at any hour from 48 h before the suspicion to 24 h after it, both ends included; the
--                 first suspicion that has such an hour counts (mimic-code, commit 8bcbd190ca75, sepsis3.sql)
--   rise = true   SOFA of 2 or more above its lowest value so far in this window, and only the episode's first
--                 suspicion counts (ricu, commit c0efac720dbe, sep3 with delta_cummin and si_window "first")

CREATE OR REPLACE TABLE septic AS
WITH suspected AS (
    SELECT *, rank() OVER (PARTITION BY episode_id ORDER BY suspicion_time) AS place
    FROM suspicions
    WHERE suspicion_time IS NOT NULL AND episode_id IS NOT NULL
),
windows AS (
    SELECT s.episode_id, s.number, s.suspicion_time, s.antibiotic_time, s.culture_time, f.* EXCLUDE episode_id,
           CASE WHEN getvariable('rise')
                THEN f.score - min(f.score) OVER (PARTITION BY s.number ORDER BY f.hour) ELSE f.score END AS organ_points
    FROM suspected s JOIN sofa f
      ON f.episode_id = s.episode_id
     AND f.hour BETWEEN s.suspicion_time - INTERVAL 48 HOURS AND s.suspicion_time + INTERVAL 24 HOURS
    WHERE s.place = 1 OR NOT getvariable('rise')
)
SELECT episode_id, suspicion_time, antibiotic_time, culture_time, hour AS sofa_time, score AS sofa,
       respiration, coagulation, liver, cardiovascular, nervous, renal
FROM windows
WHERE organ_points >= 2
QUALIFY row_number() OVER (
    PARTITION BY episode_id ORDER BY suspicion_time, antibiotic_time, culture_time, hour, number) = 1;
